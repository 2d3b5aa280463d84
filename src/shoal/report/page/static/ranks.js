"use strict";
// The ranks: a heat map of ranks and steps, the slow ones by name, and a timeline of the phases of a step.

// Cividis, which looks alike with any color vision; a slow rank is the bright end in the dark and the dark end in the light.
const RAMP = [[0, 34, 78], [65, 77, 107], [124, 123, 120], [188, 175, 111], [254, 232, 56]];
const PHASE_PLACES = { data: 4, forward: 0, backward: 1, reduce: 2, optimizer: 3, between: 6 };

/** Return the color of a share between 0 and 1. */
function rampColor(share) {
  const along = Math.min(1, Math.max(0, isDark() ? share : 1 - share)) * (RAMP.length - 1);
  const at = Math.min(RAMP.length - 2, Math.floor(along));
  const mixed = RAMP[at].map((value, i) => Math.round(value + (RAMP[at + 1][i] - value) * (along - at)));
  return `rgb(${mixed.join(",")})`;
}

/** Return the section's content for a run's ranks. */
function ranksView(ranks) {
  if (!ranks?.steps?.length) return el("p", { class: "quiet" }, "No rank was measured yet: see metrics.split_every.");
  return el("div", {}, slowRanks(ranks), heatMap(ranks), timelines(ranks), memoryOfRanks(ranks) ?? "");
}

/** Return a sentence or table of the ranks that are slower than the others. */
function slowRanks(ranks) {
  if (ranks.ranks < 2) return el("p", { class: "quiet" }, "One rank: there is no other to compare it with.");
  if (!ranks.slow.length) return el("p", {}, `None of the ${count(ranks.ranks)} ranks was 20% slower than the median rank for several measured steps in a row.`);
  const when = (each) => (each.last_step == null ? `since step ${count(each.first_step)}` : `steps ${count(each.first_step)} to ${count(each.last_step)}`);
  return el("div", {},
    el("p", {}, "Slower than the median rank for several measured steps in a row:"),
    table(["rank", "busy (× the median)", "slow in", "when", "place in the layout"],
      ranks.slow.map((each) => [count(each.rank), `${each.factor.toFixed(2)}×`, each.phase, when(each), each.place]), { label: "Slow ranks" }));
}

const MEMORY_NAMES = { memory_bytes: "in use", peak_memory_bytes: "peak in use", reserved_bytes: "reserved", peak_reserved_bytes: "peak reserved" };

/** Return the least, median and greatest memory over all ranks, of the last measured step. */
function memoryOfRanks(ranks) {
  const rows = Object.entries(ranks.memory ?? {}).filter(([, values]) => values.length).map(([name, values]) => {
    const sorted = [...values].sort((a, b) => a - b);
    const most = values.indexOf(sorted[sorted.length - 1]);
    return [MEMORY_NAMES[name] ?? name, bytes(sorted[0]), bytes(sorted[sorted.length >> 1]), bytes(sorted[sorted.length - 1]), count(most), bytes(values.reduce((a, b) => a + b, 0))];
  });
  if (!rows.length) return null;
  return el("div", {}, el("h3", {}, "Memory of the ranks"), table(["memory", "least", "median", "most", "rank with the most", "all ranks"], rows, { label: "Memory of the ranks" }));
}

/** Return a canvas of ranks and steps; a cell is the largest ratio of its ranks and steps, so that none is hidden. */
function heatMap(ranks) {
  const [rows, columns] = [ranks.cells.length, ranks.cells[0].length];
  const top = Math.max(1.5, ...ranks.cells.flat().filter(Number.isFinite));
  const limit = Math.min(top, 3);
  const canvas = el("canvas", { class: "heat", width: columns, height: rows, tabindex: "0", role: "img", "aria-label": `Heat map of ${ranks.ranks} ranks and ${ranks.steps.length} columns of steps; arrow keys read its cells` });
  canvas.style.height = `${Math.min(420, Math.max(60, rows * Math.max(2, Math.min(24, 240 / rows))))}px`;
  const paint = () => {
    const ctx = canvas.getContext("2d");
    ranks.cells.forEach((row, y) => row.forEach((value, x) => {
      ctx.fillStyle = value == null ? cssColor("--grid") : rampColor((value - 1) / (limit - 1));
      ctx.fillRect(x, y, 1, 1);
    }));
  };
  paint();
  canvas.repaint = paint;
  const said = el("p", { class: "quiet said", "aria-live": "polite" }, "Point at a cell to read it.");
  const read = (x, y) => {
    const names = ranks.rows[y];
    const who = names[0] === names[1] ? `rank ${names[0]}` : `slowest of ranks ${names[0]} to ${names[1]}`;
    const value = ranks.cells[y][x];
    said.textContent = value == null ? `step ${count(ranks.steps[x])}, ${who}: not measured`
      : `step ${count(ranks.steps[x])}, ${who}: ${value.toFixed(2)}× the median, mostly in ${ranks.phases[ranks.slow_phase[y][x]]}`;
  };
  let [x, y] = [0, 0];
  canvas.addEventListener("mousemove", (event) => {
    const box = canvas.getBoundingClientRect();
    x = Math.min(columns - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * columns)));
    y = Math.min(rows - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * rows)));
    read(x, y);
  });
  canvas.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!way) return;
    event.preventDefault();
    [x, y] = [Math.min(columns - 1, Math.max(0, x + way[0])), Math.min(rows - 1, Math.max(0, y + way[1]))];
    read(x, y);
  });
  const bar = el("span", { class: "ramp" }, [0, 0.25, 0.5, 0.75, 1].map((share) => swatch(rampColor(share))));
  return el("div", {},
    el("h3", {}, "Busy time of each rank, relative to the median rank of the step (×)"),
    el("div", { class: "heatgrid" },
      el("div", { class: "side" }, el("span", {}, "rank 0"), el("span", {}, rows > 1 ? `rank ${ranks.rows[rows - 1][1]}` : "")), canvas,
      el("div", { class: "below" }, el("span", {}, `step ${count(ranks.steps[0])}`), el("span", {}, columns > 1 ? `step ${count(ranks.steps[columns - 1])}` : ""))),
    el("p", { class: "scale" }, "1× ", bar, ` ${limit.toFixed(1)}×${limit < top ? " or more" : ""}`), said);
}

/** Return a square of a color. */
function swatch(color) {
  return svg("svg", { width: 14, height: 12, class: "swatch", "aria-hidden": "true" }, svg("rect", { width: 14, height: 12, fill: color }));
}

/** Return the timelines of the measured steps that the data has: the last, the slowest, the mean. */
function timelines(ranks) {
  const host = el("div", {});
  const choose = el("select", { onchange: () => host.replaceChildren(timeline(ranks, ranks.timelines[choose.selectedIndex])) },
    ranks.timelines.map((each) => el("option", {}, each.name)));
  host.append(timeline(ranks, ranks.timelines[0]));
  return el("div", {}, el("h3", {}, "Phases of a step on each rank (busy time, without waits)"), el("label", { class: "field" }, "Show ", choose), host);
}

/** Return bars of the phases of each rank, one after the other, over milliseconds. */
function timeline(ranks, shown) {
  const longest = Math.max(1e-9, ...shown.ranks.map((each) => each.seconds.reduce((a, b) => a + b, 0)));
  const [unit, scale] = longest < 1 ? ["ms", 1000] : ["s", 1];
  const ticks = roundTicks(0, longest * scale, 4);
  const end = Math.max(longest, ticks[ticks.length - 1] / scale);
  const legend = el("p", { class: "keys" }, ranks.phases.map((phase) => el("span", { class: "value" }, swatch(styleOf(PHASE_PLACES[phase] ?? 5).color), ` ${phase}`)));
  const rows = shown.ranks.map((each) => {
    const words = ranks.phases.map((phase, i) => `${phase} ${duration(each.seconds[i])}`).join(", ");
    const bar = svg("svg", { class: "bar", viewBox: "0 0 1000 10", preserveAspectRatio: "none", role: "img", "aria-label": `${each.name}: ${words}` }, svg("title", {}, words));
    let left = 0;
    each.seconds.forEach((seconds, i) => {
      const width = (seconds / end) * 1000;
      bar.append(svg("rect", { x: left, y: 0, width, height: 10, fill: styleOf(PHASE_PLACES[ranks.phases[i]] ?? 5).color }));
      left += width;
    });
    return el("div", { class: "row" }, el("span", { class: "name" }, each.name), bar, el("span", { class: "total" }, duration(left / 1000 * end)));
  });
  const axis = el("div", { class: "row axis" }, el("span", { class: "name" }), el("span", { class: "ticks" }, ticks.map((tick) => {
    const mark = el("span", {}, tick === 0 ? "0" : `${number(tick)} ${unit}`);
    mark.style.left = `${(tick / scale / end) * 100}%`;
    return mark;
  })), el("span", { class: "total" }));
  return el("div", { class: "timeline" }, legend, rows, axis);
}
