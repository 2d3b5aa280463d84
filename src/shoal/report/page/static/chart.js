"use strict";
// A chart: uPlot draws the axes, the cursor and the selection; the curves are drawn here, from windows of minimum, maximum
// and mean, so that no point is ever left out.

const AXES = {
  step: { label: "step", of: (window) => window.step, show: (v) => (Math.abs(v) < 1e7 ? (Number.isInteger(v) ? count(v) : number(v, 8)) : metric(v)) },
  tokens: { label: "tokens trained on", of: (window) => window.tokens, show: (v) => metric(v) },
  flop: { label: "training compute (FLOP)", of: (window, run) => window.tokens.map((t) => t * run.flops_per_token), show: (v) => metric(v) },
  seconds: { label: "training time (seconds, minutes, hours)", of: (window) => window.seconds, show: duration },
};

/** Return about `count` round values between two limits; of bytes, round multiples of GiB, MiB or KiB. */
function roundTicks(low, high, count, isBytes = false) {
  const unit = isBytes ? 1024 ** Math.max(0, Math.floor(Math.log2(Math.max(Math.abs(low), Math.abs(high), 1)) / 10)) : 1;
  if (unit > 1) return roundTicks(low / unit, high / unit, count).map((tick) => tick * unit);
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((each) => each * power >= rough) * power;
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

/** Return round values on a logarithmic axis: 1, 2 and 5 of each power of ten, or fewer. */
function logTicks(low, high, count, isBytes = false) {
  const decades = Math.log10(high / low);
  if (decades < 1) return roundTicks(low, high, count, isBytes);
  const factors = decades * 3 <= count ? [1, 2, 5] : [1];
  const every = Math.ceil(decades / Math.max(1, count));
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    if (power % every) continue;
    for (const factor of factors) if (factor * 10 ** power >= low && factor * 10 ** power <= high) ticks.push(Number((factor * 10 ** power).toPrecision(12)));
  }
  return ticks;
}

/** Return means smoothed by a Gaussian of this width; values without neighbors stay as they are. */
function smoothed(x, window, sigma) {
  const found = new Float64Array(x.length);
  for (let i = 0, begin = 0; i < x.length; i++) {
    while (x[begin] < x[i] - 3 * sigma) begin++;
    let [sum, weights] = [0, 0];
    for (let j = begin; j < x.length && x[j] <= x[i] + 3 * sigma; j++) {
      if (!Number.isFinite(window.mean[j])) continue;
      const weight = (window.count[j] - window.gaps[j]) * Math.exp(-0.5 * ((x[j] - x[i]) / sigma) ** 2);
      sum += weight * window.mean[j];
      weights += weight;
    }
    found[i] = weights ? sum / weights : NaN;
  }
  return found;
}

/** A chart of some curves over a shared horizontal axis. */
class Chart {
  /**
   * spec: {title, unit, curves(run) -> [{name, label, marks}], show, fromZero}. view: the choices that all charts share.
   */
  constructor(spec, view) {
    [this.spec, this.view, this.drawn, this.whole] = [spec, view, [], new Map()];
    this.values = el("div", { class: "values", "aria-hidden": "true" });
    this.plot = el("div", { class: "plot", tabindex: "0", role: "img", onkeydown: (event) => this.key(event) });
    this.note = el("p", { class: "quiet", hidden: true });
    const reset = el("button", { type: "button", class: "reset", hidden: true, onclick: () => view.zoom(null) }, "Reset zoom");
    this.reset = reset;
    this.element = el("figure", { class: "chart" },
      el("figcaption", {}, (this.title = el("span", { class: "title" }, spec.title)), reset), this.plot, this.values, this.note);
    new ResizeObserver(() => this.resize()).observe(this.plot);
  }

  resize() {
    const width = Math.floor(this.plot.clientWidth);
    if (!width || width === this.width) return;
    this.width = width;
    this.load();
  }

  /** Forget what was loaded: a run went on, or was rewritten. */
  forget() { this.whole.clear(); }

  /** Return the curves to draw: one entry for each run and name. */
  curves() {
    const runs = this.spec.ofOne ? this.view.chosen() : this.view.visible();
    return runs.flatMap((run) => this.spec.curves(run, this.view).map((curve) => ({ ...curve, run, key: `${run.id}\n${curve.name}` })));
  }

  columns(curves) {
    const pixels = Math.ceil(this.width * devicePixelRatio);
    return Math.max(200, Math.min(pixels, Math.floor(60000 / Math.max(1, curves.length))));
  }

  /** Load the shown windows and draw, after the charts that were asked before: the first one is seen while others wait. */
  load() {
    const turn = (this.turn = (this.turn ?? 0) + 1);
    const loaded = this.view.line.then(() => this.loadInTurn(turn));
    this.view.line = loaded.catch((error) => this.view.say(error.message));
    return loaded;
  }

  /** A later call makes an earlier one end without drawing. */
  async loadInTurn(turn) {
    if (!this.width || turn !== this.turn) return;
    const curves = this.curves();
    const columns = this.columns(curves);
    const loaded = await Promise.all(curves.map((curve) => this.windowOf(curve, columns)));
    if (turn !== this.turn) return;
    this.drawn = curves.map((curve, i) => ({ ...curve, window: loaded[i] })).filter((curve) => curve.window?.step.length);
    for (const curve of this.drawn) curve.x = AXES[this.view.axis].of(curve.window, curve.run);
    this.draw();
    await new Promise((resolve) => setTimeout(resolve));  // let the browser show it
  }

  async windowOf(curve, columns) {
    if (this.view.axis === "flop" && !curve.run.flops_per_token) return null;
    const key = `${curve.key}\n${columns}`;
    if (!this.whole.has(key)) this.whole.set(key, this.view.source.window(curve.run.id, curve.name, 0, Infinity, columns));
    const whole = await this.whole.get(key);
    const range = this.view.range;
    if (!whole || !range) return whole;
    const x = AXES[this.view.axis].of(whole, curve.run);
    const begin = placeOf(x, range[0]) - 1;
    const end = Math.min(placeOf(x, range[1]), x.length - 1);
    if (end < 0 || begin >= x.length) return null;
    return this.view.source.window(curve.run.id, curve.name, begin < 0 ? 0 : whole.step[begin], whole.step[end], columns);
  }

  /** Return the limits of the horizontal axis: the chosen range, or all points of the drawn curves. */
  horizontal() {
    if (this.view.range) return this.view.range;
    let [low, high] = [Infinity, -Infinity];
    for (const { x } of this.drawn) {
      low = Math.min(low, x.find((v) => !this.view.logX || v > 0) ?? low);
      high = Math.max(high, x[x.length - 1]);
    }
    if (!this.view.logX && low < 0.05 * high) low = 0;
    return low < high ? [low, high] : [low - 1, low + 1];
  }

  /** Return the limits of the vertical axis: all points shown, or with "fit the curve" the means alone. */
  vertical([first, last]) {
    const log = this.isLog();
    let [low, high] = [Infinity, -Infinity];
    const add = (value) => {
      if (!Number.isFinite(value) || (log && value <= 0)) return;
      low = Math.min(low, value);
      high = Math.max(high, value);
    };
    for (const { x, window } of this.drawn) {
      let [from, to] = [placeOf(x, first), Math.min(x.length, placeOf(x, last) + 1)];
      if (from && window.count[from - 1] > 1) from--;  // a bucket whose middle is left of the range may reach into it
      if (this.view.fit) for (const value of fitted(window.mean.subarray(from, to))) add(value);
      else for (let i = from; i < to; i++) (add(window.low[i]), add(window.high[i]));
    }
    if (low > high) [low, high] = log ? [0.1, 1] : [0, 1];
    if (this.spec.fromZero && !log) low = Math.min(low, 0);
    if (log) return [low / (high / low) ** 0.04 / 1.001, high * (high / low) ** 0.04 * 1.001];
    const room = (high - low || Math.abs(high) || 1) * 0.05;
    return [this.spec.fromZero && low >= 0 ? 0 : low - room, high + room];
  }

  isLog() { return this.view.logY && !this.spec.neverLog; }

  draw() {
    const empty = !this.drawn.length;
    this.element.classList.toggle("empty", empty);
    this.plot.setAttribute("aria-label", this.described());
    this.title.textContent = this.spec.ofOne && this.view.runs.length > 1 ? `${this.spec.title} · ${this.view.chosen().map((run) => run.name).join("")}` : this.spec.title;
    this.note.hidden = !empty;
    this.note.textContent = this.view.axis === "flop" ? "No run here records its FLOP per token." : "No data yet.";
    this.reset.hidden = !this.view.range;
    this.uplot?.destroy();
    this.uplot = null;
    if (empty) return;
    const [x, y] = [this.horizontal(), null];
    this.limits = [x, this.vertical(x)];
    this.uplot = new uPlot(this.options(), [[x[0], x[1]], [null, null]], this.plot);
    this.follow(this.at ?? null);  // the cursor stays where it was
  }

  described() {
    const names = [...new Set(this.drawn.map((curve) => curve.run.name))];
    return `${this.spec.title} in ${this.spec.unit || "numbers"} by ${AXES[this.view.axis].label}, of ${names.slice(0, 5).join(", ")}${names.length > 5 ? ` and ${names.length - 5} more` : ""}. `
      + "Arrow keys move the cursor, with Shift the range; plus and minus zoom; 0 resets.";
  }

  options() {
    const [muted, grid] = [cssColor("--muted"), cssColor("--grid")];
    const font = "12px system-ui, sans-serif";
    const axis = { stroke: muted, font, labelFont: font, labelSize: 18, labelGap: 2, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1, size: 5 }, gap: 4 };
    const show = this.spec.show ?? ((value) => number(value));
    const { label, show: showX } = AXES[this.view.axis];
    const ticks = (isLog, room) => (u, side, low, high) => {
      const size = (side === 0 ? u.bbox.width : u.bbox.height) / devicePixelRatio;
      return (isLog ? logTicks : roundTicks)(low, high, Math.max(2, Math.floor(size / room)), side === 1 && this.spec.show === bytes);
    };
    const keep = (u, splits) => splits;
    return {
      width: this.width,
      height: this.spec.height ?? Math.round(Math.min(300, Math.max(190, this.width * 0.42))),
      padding: [14, 30, 0, 0],
      legend: { show: false },
      cursor: { points: { show: false }, drag: { x: true, y: false, setScale: false }, y: false, bind: { dblclick: () => () => this.view.zoom(null) } },
      scales: {
        x: { time: false, distr: this.view.logX ? 3 : 1, range: () => this.limits[0] },
        y: { distr: this.isLog() ? 3 : 1, range: () => this.limits[1] },
      },
      axes: [
        { ...axis, label, size: 30, splits: ticks(this.view.logX, this.view.axis === "seconds" ? 80 : 90), filter: keep, values: (u, splits) => splits.map(showX) },
        { ...axis, label: this.name(), splits: ticks(this.isLog(), 38), filter: keep, values: (u, splits) => splits.map(show), size: (u, values) => (values ? Math.max(34, ...values.map((v) => 7 * String(v).length + 12)) : 40) },
      ],
      series: [{}, { show: true, paths: () => null, points: { show: false } }],
      hooks: { draw: [(u) => this.paint(u)], setSelect: [(u) => this.selected(u)], setCursor: [(u) => this.moved(u)] },
    };
  }

  selected(u) {
    if (u.select.width < 4) return;
    const range = [u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")];
    u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.view.zoom(range);
  }

  key(event) {
    if (!this.uplot) return;
    const [low, high] = this.limits[0];
    const size = high - low;
    const ways = { ArrowLeft: -1, ArrowRight: 1 };
    if (event.key in ways && event.shiftKey) this.view.zoom([low + ways[event.key] * size * 0.2, high + ways[event.key] * size * 0.2]);
    else if (event.key in ways) this.step(ways[event.key]);
    else if (event.key === "+" || event.key === "=") this.view.zoom([low + size * 0.2, high - size * 0.2]);
    else if (event.key === "-") this.view.zoom([Math.max(0, low - size / 3), high + size / 3]);
    else if (event.key === "0" || event.key === "Escape") this.view.zoom(null);
    else return;
    event.preventDefault();
  }

  /** Move the cursor by some pixels, as with the mouse. */
  step(way) {
    const width = this.uplot.over.clientWidth;
    const left = Math.min(width, Math.max(0, (this.uplot.cursor.left >= 0 ? this.uplot.cursor.left : width / 2) + way * 8));
    this.uplot.setCursor({ left, top: 10 });
  }

  moved(u) {
    const at = u.cursor.left >= 0 ? u.posToVal(u.cursor.left, "x") : null;
    this.showValues(at);
    this.view.follow(this, at);
  }

  /** Show the cursor of another chart here. */
  follow(at) {
    this.at = at;
    if (!this.uplot) return;
    const left = at == null ? -10 : this.uplot.valToPos(at, "x");
    this.uplot.setCursor({ left, top: at == null ? -10 : 10 }, false);
    this.showValues(at);
  }

  /** Show the values at a place of the horizontal axis, or the last ones, for the first curves. */
  showValues(at) {
    this.at = at;
    const show = this.spec.show ?? ((value) => number(value));
    const unit = this.spec.show || !this.spec.unit ? "" : ` ${this.spec.unit}`;
    const first = (curve) => (curve.run.id === this.view.highlighted ? 0 : 1);
    const shown = [...this.drawn].sort((a, b) => first(a) - first(b)).slice(0, this.isSingle() ? 12 : this.spec.height ? 6 : 3);
    const rows = shown.map((curve) => {
      const { window, x } = curve;
      const place = at == null ? x.length - 1 : Math.min(x.length - 1, placeOf(x, at));
      const [low, high, mean] = [window.low[place], window.high[place], window.mean[place]];
      const spread = low < high ? ` (${show(low)} to ${show(high)})` : "";
      return el("span", { class: "value" }, sample(this.styleOf(curve)), ` ${this.labelOf(curve)} `, el("b", {}, `${show(mean)}${unit}`), spread);
    });
    if (this.drawn.length > shown.length) rows.push(el("span", { class: "quiet" }, `and ${this.drawn.length - shown.length} more curves`));
    const nearest = at == null || !shown.length ? at : shown[0].x[Math.min(shown[0].x.length - 1, placeOf(shown[0].x, at))];
    const where = at == null ? "last" : `${AXES[this.view.axis].label.split(" ")[0]} ${AXES[this.view.axis].show(nearest)}`;
    this.values.replaceChildren(el("span", { class: "where" }, where), ...rows);
  }

  labelOf(curve) {
    return !this.isSingle() ? [curve.run.name, curve.label].filter(Boolean).join(" · ") : curve.label || curve.run.name;
  }

  /** Return the name of the vertical axis, with its unit. */
  name() {
    const name = this.spec.axis ?? this.spec.title.toLowerCase();
    return this.spec.unit ? `${name} (${this.spec.unit})` : name;
  }

  /** Return whether only one run is drawn, so that its curves need no name of a run. */
  isSingle() { return this.spec.ofOne || this.view.visible().length === 1; }

  /** Runs have colors; the curves of one run have colors too if it is shown alone. */
  styleOf(curve) {
    const same = this.drawn.filter((other) => other.run.id === curve.run.id && !other.marks === !curve.marks);
    const place = same.findIndex((other) => other.name === curve.name);
    if (this.isSingle()) return styleOf(curve.run.place + (curve.marks ? 1 : 0) + place);
    return { color: styleOf(curve.run.place).color, dash: place ? DASHES[place % DASHES.length] : styleOf(curve.run.place).dash };
  }

  // --- painting ---

  paint(u) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    this.pixels = { x: (v) => u.valToPos(v, "x", true), y: (v) => u.valToPos(v, "y", true) };
    for (const event of this.events()) this.paintEvent(ctx, bbox, event);
    const last = this.view.highlighted;
    const curves = last ? [...this.drawn].sort((a, b) => (a.run.id === last) - (b.run.id === last)) : this.drawn;
    for (const curve of curves) this.paintCurve(ctx, bbox, curve, last && curve.run.id !== last);
    ctx.restore();
    for (const event of this.events()) this.paintMark(ctx, bbox, event);
  }

  paintCurve(ctx, bbox, curve, isFaint) {
    const style = this.styleOf(curve);
    const xs = Float64Array.from(curve.x, this.pixels.x);
    ctx.strokeStyle = ctx.fillStyle = style.color;
    ctx.lineJoin = "round";
    const fade = isFaint ? 0.25 : 1;
    const sigma = (this.view.smoothing / 100) * bbox.width;
    if (!curve.marks) this.paintBand(ctx, bbox, curve, xs, fade * 1);
    const means = sigma && !curve.marks ? smoothed(xs, curve.window, sigma) : curve.window.mean;
    ctx.globalAlpha = fade;
    ctx.lineWidth = (curve.run.id === this.view.highlighted ? 3 : 1.75) * devicePixelRatio;
    ctx.setLineDash(style.dash.map((each) => each * devicePixelRatio));
    this.paintLine(ctx, xs, means);
    ctx.setLineDash([]);
    if (curve.marks) this.paintDots(ctx, xs, means);
    else this.paintGaps(ctx, bbox, curve, xs);
    if (this.view.fit) this.paintBeyond(ctx, bbox, curve, xs);
    ctx.globalAlpha = 1;
  }

  /** Paint each bucket from its least to its greatest value, at least a pixel wide; a spike stands out. */
  paintBand(ctx, bbox, { window }, xs, fade) {
    const heights = Float64Array.from(window.high, (high, i) => high - window.low[i]);
    const usual = heights.slice().sort()[heights.length >> 1] || 0;
    const [band, spikes] = [new Path2D(), new Path2D()];
    const [log, floor] = [this.isLog(), this.limits[1][0]];
    for (let i = 0; i < xs.length; i++) {
      const isPoint = window.high[i] === window.low[i];  // the line shows it
      if (isPoint || !Number.isFinite(window.high[i]) || (log && window.high[i] <= 0)) continue;
      const [left, right] = [Math.floor((xs[Math.max(0, i - 1)] + xs[i]) / 2), Math.ceil((xs[i] + xs[Math.min(xs.length - 1, i + 1)]) / 2)];
      const top = this.pixels.y(window.high[i]);
      const bottom = this.pixels.y(log && window.low[i] <= 0 ? floor : window.low[i]);
      const isSpike = window.count[i] > 1 && heights[i] > 3 * usual;
      const [width, height] = [Math.max(devicePixelRatio, right - left), Math.max(devicePixelRatio, bottom - top)];
      band.rect(left, top, width, height);
      if (isSpike) spikes.rect(xs[i] - devicePixelRatio, top, 2 * devicePixelRatio, height);
    }
    ctx.globalAlpha = 0.3 * fade;
    ctx.fill(band);
    ctx.globalAlpha = 0.8 * fade;
    ctx.fill(spikes);
    if (this.view.smoothing) {  // single points have no height: a thin line shows them behind the smoothed one
      ctx.globalAlpha = 0.45 * fade;
      ctx.lineWidth = devicePixelRatio;
      this.paintLine(ctx, xs, window.mean);
    }
  }

  paintLine(ctx, xs, values) {
    const log = this.isLog();
    ctx.beginPath();
    let isDown = false;
    for (let i = 0; i < xs.length; i++) {
      const isGap = !Number.isFinite(values[i]) || (log && values[i] <= 0);
      if (!isGap) ctx[isDown ? "lineTo" : "moveTo"](xs[i], this.pixels.y(values[i]));
      isDown = !isGap;
    }
    ctx.stroke();
  }

  paintDots(ctx, xs, values) {
    if (xs.length > 120) return;
    for (let i = 0; i < xs.length; i++) {
      ctx.beginPath();
      ctx.arc(xs[i], this.pixels.y(values[i]), 3 * devicePixelRatio, 0, 7);
      ctx.fill();
    }
  }

  /** Paint a cross at the lower border where points are NaN or infinite. */
  paintGaps(ctx, bbox, { window }, xs) {
    const [size, y] = [4 * devicePixelRatio, bbox.top + bbox.height - 7 * devicePixelRatio];
    ctx.beginPath();
    for (let i = 0; i < xs.length; i++) {
      if (!window.gaps[i]) continue;
      ctx.moveTo(xs[i] - size, y - size);
      ctx.lineTo(xs[i] + size, y + size);
      ctx.moveTo(xs[i] - size, y + size);
      ctx.lineTo(xs[i] + size, y - size);
    }
    ctx.stroke();
  }

  /** Paint triangles at the border for values beyond it. */
  paintBeyond(ctx, bbox, { window }, xs) {
    const size = 5 * devicePixelRatio;
    const [low, high] = this.limits[1];
    ctx.beginPath();
    for (let i = 0; i < xs.length; i++) {
      for (const [isBeyond, y, way] of [[window.high[i] > high, bbox.top, 1], [window.low[i] < low, bbox.top + bbox.height, -1]]) {
        if (!isBeyond) continue;
        ctx.moveTo(xs[i], y);
        ctx.lineTo(xs[i] - size, y + way * size * 1.6);
        ctx.lineTo(xs[i] + size, y + way * size * 1.6);
        ctx.closePath();
      }
    }
    ctx.fill();
  }

  // --- events ---

  /** Return the shown events with their place on the horizontal axis, which follows from the first curve of their run. */
  events() {
    if (!this.spec.events) return [];
    return this.view.events().flatMap((event) => {
      const curve = this.drawn.find((each) => each.run.id === event.run && !each.marks);
      if (!curve || event.step == null) return [];
      const place = placeOf(curve.window.step, event.step);
      const x = this.view.axis === "step" ? event.step : curve.x[Math.min(place, curve.x.length - 1)];
      const [first, last] = this.limits[0];
      return x >= first && x <= last ? [{ ...event, x }] : [];
    });
  }

  paintEvent(ctx, bbox, event) {
    ctx.strokeStyle = cssColor(event.isBad ? "--bad" : "--muted");
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
    ctx.beginPath();
    ctx.moveTo(this.pixels.x(event.x), bbox.top);
    ctx.lineTo(this.pixels.x(event.x), bbox.top + bbox.height);
    ctx.stroke();
    ctx.setLineDash([]);
  }

  /** Paint a mark above the plot: a triangle for trouble, a circle for the rest. */
  paintMark(ctx, bbox, event) {
    const [x, y, size] = [this.pixels.x(event.x), bbox.top - 6 * devicePixelRatio, 4.5 * devicePixelRatio];
    ctx.fillStyle = cssColor(event.isBad ? "--bad" : "--muted");
    ctx.beginPath();
    if (event.isBad) {
      ctx.moveTo(x, y + size);
      ctx.lineTo(x - size, y - size);
      ctx.lineTo(x + size, y - size);
    } else ctx.arc(x, y, size * 0.8, 0, 7);
    ctx.fill();
  }
}

/** Return the values without the most extreme hundredth on each side. */
function fitted(values) {
  const sorted = Float64Array.from(values).filter(Number.isFinite).sort();
  const skipped = Math.floor(sorted.length / 100);
  return sorted.subarray(skipped, sorted.length - skipped);
}
