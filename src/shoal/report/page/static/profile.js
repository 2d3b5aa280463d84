"use strict";
// The profile of a few steps: where their time and memory went. It needs no other script; colors come from CSS variables.

/** Draw a profile, or several to choose from, into `element`. data: what `profile_view` returns, or a list of it. */
const drawProfile = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  // Okabe and Ito's colors, mixed with the page's own: text on them keeps its contrast in light and dark.
  const HUES = { forward: "#0072b2", backward: "#d55e00", reduce: "#009e73", optimizer: "#cc79a7", data: "#e69f00", step: "#888888" };
  const KINDS = [["parameters", "#0072b2"], ["gradients", "#d55e00"], ["optimizer", "#cc79a7"], ["activations", "#009e73"]];
  const ROW = 20;
  const color = (name, other) => `var(${name}, ${other})`;
  const TEXT = color("--text", "CanvasText"), MUTED = color("--muted", "GrayText"), LINE = color("--line", "#888");
  const tint = (hue, share = 38) => `color-mix(in srgb, ${hue} ${share}%, ${color("--page", "Canvas")})`;

  function make(tag, props = {}, ...children) {
    const node = tag.startsWith("svg:") ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
    for (const [name, value] of Object.entries(props)) {
      if (name === "style") Object.assign(node.style, value);
      else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value != null && value !== false) node.setAttribute(name, value === true ? "" : String(value));
    }
    node.append(...children.flat(Infinity).filter((child) => child != null));
    return node;
  }

  const three = (value) => (value < 10 ? value.toFixed(2) : value < 100 ? value.toFixed(1) : value.toFixed(0));
  function seconds(value) {
    if (value == null) return "–";
    if (value === 0) return "0 s";
    return value >= 1 ? `${three(value)} s` : value >= 1e-3 ? `${three(value * 1e3)} ms` : `${three(value * 1e6)} µs`;
  }
  function size(value) {
    if (value == null) return "–";
    for (const [power, unit] of [[3, "GiB"], [2, "MiB"], [1, "KiB"]]) {
      if (value >= 1024 ** power) return `${three(value / 1024 ** power)} ${unit}`;
    }
    return `${value} B`;
  }
  const percent = (value, digits = 1) => (value == null ? "–" : `${value.toFixed(digits)}%`);
  const kindOf = (module) => module.replace(/(^|\.)\d+(?=\.|$)/g, "$1*");
  const plural = (count, word, more = `${word}s`) => `${count.toLocaleString("en-US")} ${count === 1 ? word : more}`;

  function table(label, header, rows) {
    const numeric = header.map((_, i) => rows.length > 0 && rows.every((row) => !(row[i] instanceof Node) && /^[–\d]/.test(row[i])));
    const style = (i) => (numeric[i] ? { textAlign: "right", fontVariantNumeric: "tabular-nums", whiteSpace: "nowrap" } : {});
    return make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": label, style: { overflowX: "auto", maxWidth: "100%" } },
      make("table", {},
        make("thead", {}, make("tr", {}, header.map((name, i) => make("th", { scope: "col", style: style(i) }, name)))),
        make("tbody", {}, rows.map((row) => make("tr", {}, row.map((value, i) => make("td", { style: style(i) }, value)))))));
  }

  const name = (text) => make("code", { style: { display: "inline-block", minWidth: "20ch", overflowWrap: "anywhere" } }, text);

  function facts(pairs) {
    return make("dl", { class: "facts" }, pairs.filter(([, value]) => value != null).map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  }

  function keys(pairs) {
    const square = (hue, share) => make("svg:svg", { width: 14, height: 12, "aria-hidden": "true", style: { verticalAlign: "middle", marginRight: "5px" } },
      make("svg:rect", { width: 14, height: 12, style: { fill: tint(hue, share), stroke: hue } }));
    return make("div", { class: "keys", style: { display: "flex", flexWrap: "wrap", gap: "2px 16px", fontSize: "13px" } },
      pairs.map(([name, hue, share]) => make("span", {}, square(hue, share), name)));
  }

  /** Return a horizontal bar of parts [value, hue, share, words], scaled to `whole`. */
  function bar(parts, whole, label) {
    const node = make("svg:svg", { viewBox: "0 0 1000 18", preserveAspectRatio: "none", role: "img", "aria-label": label, style: { width: "100%", height: "18px", display: "block" } });
    let x = 0;
    for (const [value, hue, share, words] of parts) {
      const width = whole ? 1000 * value / whole : 0;
      node.append(make("svg:rect", { x, y: 1, width, height: 16, style: { fill: tint(hue, share), stroke: hue, vectorEffect: "non-scaling-stroke" } }, make("svg:title", {}, words)));
      x += width;
    }
    return node;
  }

  /** Return rows of a name, a bar and a total, in one grid. */
  function bars(rows) {
    return make("div", { style: { display: "grid", gridTemplateColumns: "minmax(70px, max-content) minmax(60px, 1fr) max-content", gap: "3px 10px", alignItems: "center", fontSize: "13px" } },
      rows.map(([name, parts, whole, total]) => [
        make("span", { style: { overflowWrap: "anywhere", maxWidth: "220px" } }, name),
        bar(parts, whole, `${name}: ${parts.map((part) => part[3]).join(", ")}`),
        make("span", { style: { textAlign: "right", fontVariantNumeric: "tabular-nums", whiteSpace: "nowrap" } }, total)]));
  }

  function choice(label, names, chosen, then) {
    const select = make("select", { onchange: () => then(select.selectedIndex) }, names.map((name, i) => make("option", { selected: i === chosen }, name)));
    return make("label", { class: "field", style: { display: "inline-flex", gap: "6px", alignItems: "center", marginRight: "16px" } }, label, select);
  }

  function head(view) {
    const span = view.first === view.last ? `step ${view.first}` : `steps ${view.first} to ${view.last}`;
    const layout = Object.entries(view.layout).map(([axis, count]) => `${axis} ${count}`).join(", ");
    const overhead = view.overhead == null ? "unknown: no step ran without the profiler" : `${view.overhead.toFixed(2)} times as long a step`;
    return make("div", {},
      facts([
        ["profiled", `${span} of ${view.total_steps.toLocaleString("en-US")}`],
        ["processes", layout ? `${view.world_size} (${layout})` : String(view.world_size)],
        ["device", view.device === "cuda" ? "GPU" : "CPU"],
        ["step with the profiler", seconds(view.step_seconds)],
        ["step without it", seconds(view.usual_step_seconds)],
        ["the profiler's overhead", overhead],
      ]),
      view.stopped_early ? make("p", { class: "bad" }, "Recording stopped early: its events took too much memory. Profile fewer steps.") : null);
  }

  function operators(view) {
    const own = view.device === "cuda" ? "GPU time of a step" : "CPU time of a step";
    const top = Math.max(...view.operators.map((each) => each.share), 1e-9);
    const rows = view.operators.map((each) => [
      name(each.name), seconds(each.seconds), percent(100 * each.share),
      make("div", { style: { width: "90px" } }, bar([[each.share, HUES.forward, 60, percent(100 * each.share)]], top, `${percent(100 * each.share)} of a step`)),
      Math.round(each.calls).toLocaleString("en-US"), each.module ? make("span", { style: { whiteSpace: "nowrap" } }, `${each.module} (${percent(100 * each.module_share, 0)})`) : make("span", {}, "none")]);
    return make("div", {}, make("h3", {}, "Dearest operators"),
      make("p", { class: "quiet" }, "Time of their own, without the operators that they call; means of a step and process."),
      table("Dearest operators", ["operator", own, "share of a step", "", "calls a step", "module with most of it"], rows));
  }

  const phaseAt = (ranges, start) => ranges.findLast((range) => range[0] === 1 && range[1] <= start + 1e-9);

  /** Return the ranges with their name, hue and the index of the range around them. */
  function nested(line) {
    const open = [];
    return line.ranges.map(([depth, start, spent, name], index) => {
      while (open.length && open[open.length - 1].depth >= depth) open.pop();
      const parent = open[open.length - 1];
      const words = line.names[name];
      const range = { depth, start, spent, name: words, parent: parent?.index ?? -1, index, hue: depth === 0 ? HUES.step : depth === 1 ? HUES[words] ?? HUES.step : parent?.hue ?? HUES.step };
      open.push(range);
      return range;
    });
  }

  /** Return the timeline of a rank. A click or Enter widens a range to the whole width; arrows go between ranges. */
  function timeline(rank) {
    const line = rank.timeline, ranges = nested(line);
    if (!ranges.length) return make("p", { class: "quiet" }, "No step was recorded.");
    const depth = Math.max(...ranges.map((range) => range.depth)) + 1;
    const rows = depth + (line.collectives.length ? 1 : 0);
    const end = Math.max(...ranges.map((range) => range.start + range.spent));
    const height = rows * ROW + 24;
    const said = make("p", { class: "quiet said", "aria-live": "polite", style: { minHeight: "3em" } });
    const canvas = make("svg:svg", { height, tabindex: "0", role: "application", "aria-label": `Timeline of rank ${rank.rank}: arrow keys go between ranges, Enter zooms in, Escape zooms out`, style: { width: "100%", display: "block", font: "12px system-ui, sans-serif" } });
    let [from, to] = [0, end], chosen = ranges[0];

    const words = (range) => {
      const parts = [range.name, seconds(range.spent)], phase = phaseAt(line.ranges, range.start);
      if (range.depth > 1 && phase) parts.push(`in ${line.names[phase[3]]}`);
      parts.push(`from ${seconds(range.start)}`);
      const around = ranges[range.parent];
      if (around) parts.push(`${percent(100 * range.spent / around.spent)} of ${around.name}`);
      return parts.join(", ");
    };
    const say = (range) => { said.textContent = words(range); };

    function paint() {
      const width = Math.max(200, canvas.clientWidth || canvas.parentNode?.clientWidth || 900), scale = width / (to - from);
      canvas.replaceChildren();
      canvas.setAttribute("viewBox", `0 0 ${width} ${height}`);
      const block = (start, spent, row, name, hue, share, range) => {
        const left = Math.max(0, (start - from) * scale), right = Math.min(width, (start + spent - from) * scale);
        if (right <= 0 || left >= width || right - left < 0.3) return;
        const box = make("svg:rect", { x: left, y: row * ROW, width: right - left, height: ROW - 2, style: { fill: tint(hue, share), stroke: range && range === chosen ? TEXT : hue, strokeWidth: range && range === chosen ? 2 : right - left > 3 ? 0.7 : 0 } });
        if (range) {
          box.addEventListener("mousemove", () => say(range));
          box.addEventListener("click", () => { chosen = range; zoom(range); });
        } else box.append(make("svg:title", {}, `${name}, ${seconds(spent)}, from ${seconds(start)}`));
        canvas.append(box);
        const short = name.split(".").pop(), room = (right - left - 8) / 7;
        const text = name.length <= room ? name : /^\d+$/.test(short) ? "" : short.length <= room ? short : "";
        if (text) canvas.append(make("svg:text", { x: left + 4, y: row * ROW + 13, style: { fill: TEXT, pointerEvents: "none" } }, text));
      };
      for (const range of ranges) block(range.start, range.spent, range.depth, range.name, range.hue, range.depth % 2 ? 42 : 28, range);
      for (const [start, spent, name] of line.collectives) block(start, spent, depth, line.names[name], "#e69f00", 55, null);
      axis(width, scale);
    }
    function axis(width, scale) {
      const y = rows * ROW, rough = (to - from) / Math.max(2, Math.floor(width / 110)), power = 10 ** Math.floor(Math.log10(rough));
      const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
      canvas.append(make("svg:line", { x1: 0, x2: width, y1: y, y2: y, style: { stroke: LINE } }));
      for (let tick = Math.ceil(from / step) * step; tick <= to; tick += step) {
        const x = (tick - from) * scale, anchor = x < 24 ? "start" : x > width - 30 ? "end" : "middle";
        canvas.append(make("svg:line", { x1: x, x2: x, y1: y, y2: y + 4, style: { stroke: LINE } }),
          make("svg:text", { x, y: y + 18, "text-anchor": anchor, style: { fill: MUTED } }, seconds(Number(tick.toPrecision(9)))));
      }
    }
    function zoom(range) {
      [from, to] = range ? [range.start, range.start + Math.max(range.spent, 1e-7)] : [0, end];
      if (range) say(range);
      else said.textContent = "Point at a range to read it; click to widen it. Keyboard: arrows, Enter, Escape.";
      paint();
    }
    const siblings = (way) => ranges.filter((range) => range.depth === chosen.depth && (way > 0 ? range.start > chosen.start : range.start < chosen.start));
    canvas.addEventListener("keydown", (event) => {
      const next = { ArrowRight: () => siblings(1)[0], ArrowLeft: () => siblings(-1).pop(), ArrowUp: () => ranges[chosen.parent], ArrowDown: () => ranges.find((range) => range.parent === chosen.index) }[event.key];
      if (event.key === "Enter") zoom(chosen);
      else if (event.key === "Escape") zoom(null);
      else if (next) { chosen = next() ?? chosen; say(chosen); paint(); }
      else return;
      event.preventDefault();
    });
    new ResizeObserver(() => paint()).observe(canvas);
    zoom(null);
    const names = [...new Set(ranges.filter((range) => range.depth === 1).map((range) => range.name))].map((name) => [name, HUES[name] ?? HUES.step, 42]);
    if (line.collectives.length) names.push(["communication, last row", "#e69f00", 55]);
    return make("div", {}, keys(names), canvas, said,
      make("button", { type: "button", onclick: () => zoom(null) }, "Whole recording"),
      line.dropped ? make("p", { class: "quiet" }, `${plural(line.dropped, "shorter range")} not drawn; the trace has all.`) : null);
  }

  function overlap(view) {
    const moved = view.overlap.filter((each) => each.communication_seconds > 0);
    if (!moved.length) return make("div", {}, make("h3", {}, "Communication"), make("p", { class: "quiet" }, "No communication between processes in these steps."));
    const top = Math.max(...moved.map((each) => each.communication_seconds));
    return make("div", {}, make("h3", {}, "Communication of a step: hidden behind computing, or waited for"),
      keys([["hidden: the process computes meanwhile", HUES.reduce, 60], ["not hidden", HUES.backward, 25]]),
      bars(moved.map((each) => {
        const open = each.communication_seconds - each.hidden_seconds;
        return [each.rank == null ? "all, mean" : `rank ${each.rank}`,
          [[each.hidden_seconds, HUES.reduce, 60, `${seconds(each.hidden_seconds)} hidden`], [open, HUES.backward, 25, `${seconds(open)} not hidden`]],
          top, `${percent(each.percent)} of ${seconds(each.communication_seconds)} hidden`];
      })));
  }

  function phases(view) {
    const top = Math.max(...view.ranks.map((rank) => Object.values(rank.phases).reduce((a, b) => a + b, 0)));
    const names = Object.keys(view.ranks[0].phases);
    return make("div", {}, make("h3", {}, "Phases of a step"), keys(names.map((name) => [name, HUES[name] ?? HUES.step, 42])),
      bars(view.ranks.map((rank) => [`rank ${rank.rank}`,
        names.map((name) => [rank.phases[name], HUES[name] ?? HUES.step, 42, `${name} ${seconds(rank.phases[name])}`]), top,
        seconds(Object.values(rank.phases).reduce((a, b) => a + b, 0))])));
  }

  /** Sum the numbers of rows [name, ...numbers] by kind of module. */
  function byKind(rows) {
    const found = new Map();
    for (const [name, ...values] of rows) {
      const held = found.get(kindOf(name)) ?? values.map(() => 0);
      found.set(kindOf(name), held.map((value, i) => value + values[i]));
    }
    return [...found].map(([name, values]) => [name, ...values]);
  }

  function modules(rank, grouped) {
    const rows = (grouped ? byKind(rank.modules) : rank.modules).map(([module, calls, forward, backward]) =>
      [name(module), seconds(forward), seconds(backward), seconds(forward + backward), Math.round(calls).toLocaleString("en-US")]);
    return make("div", {}, make("h3", {}, `Modules of rank ${rank.rank}, with those inside them`),
      table("Modules", ["module", "forward of a step", "backward of a step", "both", "forwards a step"], rows));
  }

  function memory(rank, grouped) {
    const held = rank.memory;
    if (!held) return null;
    const rows = (grouped ? byKind(held.modules) : held.modules).map((row) => ({ row, sum: row.slice(1).reduce((a, b) => a + b, 0) }));
    rows.sort((a, b) => b.sum - a.sum);
    const top = rows[0]?.sum ?? 0, shown = rows.slice(0, 24);
    const total = KINDS.map((_, i) => held.modules.reduce((sum, row) => sum + row[i + 1], 0));
    return make("div", {}, make("h3", {}, `Memory of rank ${rank.rank} by module`),
      make("p", { class: "quiet" }, `In all: ${KINDS.map(([name], i) => `${name} ${size(total[i])}`).join(", ")}. Activations are those held at the peak of the recorded steps, ${seconds(held.peak_seconds)} after their begin; ${size(held.other_bytes)} more were then held by backward, the optimizer and batches.`),
      keys(KINDS.map(([name, hue]) => [name, hue, 42])),
      bars(shown.map(({ row, sum }) => [row[0], KINDS.map(([name, hue], i) => [row[i + 1], hue, 42, `${name} ${size(row[i + 1])}`]), top, size(sum)])),
      rows.length > shown.length ? make("p", { class: "quiet" }, `${plural(rows.length - shown.length, "smaller module")} not drawn.`) : null,
      held.lines?.length ? make("div", {}, make("h3", {}, "GPU memory by line of code, at the end of the recording"), table("GPU memory by line", ["line", "memory"], held.lines.map(([line, value]) => [line, size(value)]))) : null);
  }

  function one(view) {
    if (!view.ranks.length) return make("p", { class: "quiet" }, "No rank was recorded.");
    let [rank, grouped] = [view.ranks[0], true];
    const place = make("div", {}), below = make("div", {});
    const show = (all = true) => {
      if (all) place.replaceChildren(timeline(rank));
      below.replaceChildren(...[memory(rank, grouped), modules(rank, grouped)].filter(Boolean));
    };
    const ranks = view.ranks.length > 1 ? choice("rank", view.ranks.map((each) => `rank ${each.rank}`), 0, (i) => { rank = view.ranks[i]; show(); }) : null;
    const kinds = choice("modules", ["summed over blocks", "each block"], 0, (i) => { grouped = i === 0; show(false); });
    const traces = view.traces.map((each) => `${each.file} (${size(each.bytes)}, ${each.events.toLocaleString("en-US")} events)`).join(", ");
    show();
    return make("div", { class: "profile" }, head(view),
      make("h3", {}, "Timeline: phases and modules"), make("div", {}, ranks), place, phases(view), overlap(view), operators(view),
      make("div", { style: { marginTop: "14px" } }, kinds), below,
      view.hidden_ranks ? make("p", { class: "quiet" }, `${plural(view.hidden_ranks, "more rank")} in the files of the profile.`) : null,
      make("p", { class: "quiet" }, `Traces for Perfetto, in profile/${view.folder}: ${traces}`));
  }

  return function drawProfile(element, data) {
    const views = (Array.isArray(data) ? data : [data]).filter(Boolean);
    if (!views.length) {
      element.replaceChildren(make("p", { class: "quiet" }, "No profile yet: shoal profile RUN records one."));
      return;
    }
    const host = make("div", {}), last = views.length - 1;
    const names = views.map((view) => `${view.run}, steps ${view.first} to ${view.last}`);
    element.replaceChildren(...[views.length > 1 ? choice("profile", names, last, (i) => host.replaceChildren(one(views[i]))) : null, host].filter(Boolean));
    host.replaceChildren(one(views[last]));
  };
})();
