"use strict";
// Elements, numbers with their units, and colors. All text enters the page through `textContent`, never as HTML.

/** Return an element. `props` are attributes, or listeners if the name starts with "on"; children are nodes or text. */
function el(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, String(value));
  }
  made.append(...children.flat().filter((child) => child != null && child !== false));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

/** Return an SVG element. */
function svg(tag, props = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(props)) made.setAttribute(name, String(value));
  made.append(...children);
  return made;
}

/** Return a table from a header and rows; columns of numbers are aligned to the right. */
function table(header, rows, props = {}) {
  const isNumber = header.map((_, i) => rows.length > 0 && rows.every((row) => !(row[i] instanceof Node) && /^[-–\d.,\s%×µa-zA-Z/]*$/.test(row[i]) && /^[-–\d]/.test(row[i])));
  const cell = (tag, value, i) => el(tag, { class: isNumber[i] ? "number" : "", scope: tag === "th" && "col" }, value);
  return el("div", { class: "wide", tabindex: "0", role: "region", "aria-label": props.label || "table" },
    el("table", {},
      el("thead", {}, el("tr", {}, header.map((name, i) => cell("th", name, i)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map((value, i) => cell("td", value, i)))))));
}

/** Return a number with about `digits` significant digits; thousands are separated by commas. */
function number(value, digits = 4) {
  if (value == null || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e15)) return value.toExponential(Math.max(0, digits - 2)).replace("e+", "e");
  if (size >= 10 ** (digits - 1)) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(digits)));
}

const PREFIXES = [[1e24, "Y"], [1e21, "Z"], [1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""], [1e-3, "m"], [1e-6, "µ"]];

/** Return a whole number with commas: 54,321. */
function count(value) {
  return value == null || !Number.isFinite(value) ? "–" : Math.round(value).toLocaleString("en-US");
}

/** Return a number with a metric prefix: 12.3 M. */
function metric(value, unit = "", digits = 3) {
  if (value == null || !Number.isFinite(value)) return "–";
  if (value === 0) return `0 ${unit}`.trim();
  const [size, prefix] = PREFIXES.find(([each]) => Math.abs(value) >= each) || PREFIXES[PREFIXES.length - 1];
  return `${Number((value / size).toPrecision(digits))} ${prefix}${unit}`.trim();
}

/** Return bytes as GiB, MiB or KiB. */
function bytes(value) {
  if (value == null || !Number.isFinite(value)) return "–";
  const [size, unit] = [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"], [1, "B"]].find(([each]) => Math.abs(value) >= each) || [1, "B"];
  return `${Number((value / size).toPrecision(3))} ${unit}`;
}

/** Return seconds in words: "3h12m", "12.3 s", "4.1 ms". */
function duration(seconds) {
  if (seconds == null || !Number.isFinite(seconds)) return "–";
  if (seconds === 0) return "0 s";
  if (Math.abs(seconds) < 60) return metric(seconds, "s");
  const whole = Math.round(seconds);
  const [days, hours, minutes] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60];
  if (days) return `${days}d${hours}h`;
  if (hours) return `${hours}h${String(minutes).padStart(2, "0")}m`;
  return `${minutes}m${String(whole % 60).padStart(2, "0")}s`;
}

/** Return a time of day, in the reader's time zone. */
function moment(seconds) {
  return seconds ? new Date(seconds * 1000).toLocaleString("sv-SE") : "–";
}

// Okabe and Ito's colors, which people with any color vision tell apart; the order differs so that the first ones have
// contrast on each background. Dashes tell apart runs that share a color, also in print.
const COLORS = {
  light: ["#0072b2", "#d55e00", "#008760", "#b0578d", "#a86f00", "#1f86c4", "#333333"],
  dark: ["#56b4e9", "#e69f00", "#22c197", "#e08fbd", "#f0e442", "#ff7f2a", "#dddddd"],
};
const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [5, 2], [12, 6], [1, 5], [10, 3, 2, 3, 2, 3]];

/** Return whether the page is dark now. */
function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/** Return the color and dashes of the curve at this place of the list. */
function styleOf(place) {
  const colors = COLORS[isDark() ? "dark" : "light"];
  return { color: colors[place % colors.length], dash: DASHES[Math.floor(place / colors.length) % DASHES.length] };
}

/** Return the value of a CSS variable of the page. */
function cssColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** Return a short drawn line: the sample of a curve in a legend. */
function sample(style) {
  const line = svg("line", { x1: 1, y1: 5, x2: 27, y2: 5, stroke: style.color, "stroke-width": 3 });
  if (style.dash.length) line.setAttribute("stroke-dasharray", style.dash.join(" "));
  return svg("svg", { class: "sample", width: 28, height: 10, "aria-hidden": "true" }, line);
}
