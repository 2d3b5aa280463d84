"use strict";
// Where the page's data comes from: embedded in a report, or fetched from the dashboard. Both have the same four methods.
//
// A window of a curve holds at most `columns` buckets of consecutive points. Each has the step, tokens and seconds of its
// middle point, the least, greatest and mean value of its finite points, how many points it has, and how many of them are
// gaps: NaN or infinite. A spike of one step is in `low` or `high` of its bucket at every zoom.

const FIELDS = ["step", "tokens", "seconds", "low", "high", "mean", "count", "gaps"];
const PLACES = new Set(["step", "tokens", "seconds"]);  // in more digits than the others
const MOST_KEPT = 3000;  // windows of the dashboard

/** Return the first place of a sorted array whose value is at least `value`. */
function placeOf(sorted, value) {
  let [low, high] = [0, sorted.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Return the window between two steps, with one bucket more on each side, merged to at most `columns` buckets. */
function cut(curve, first, last, columns) {
  const begin = Math.max(0, placeOf(curve.step, first) - 1);
  const end = Math.min(curve.step.length, placeOf(curve.step, last) + 2);
  const size = Math.max(1, Math.ceil((end - begin) / columns));
  const found = {};
  for (const name of FIELDS) found[name] = new Float64Array(Math.ceil((end - begin) / size));
  for (let at = begin, to = 0; at < end; at += size, to++) merge(curve, at, Math.min(at + size, end), found, to);
  return found;
}

/** Write the bucket of all points from `at` to before `end`. */
function merge(curve, at, end, found, to) {
  let [low, high, sum, finite, count, gaps] = [Infinity, -Infinity, 0, 0, 0, 0];
  for (let i = at; i < end; i++) {
    count += curve.count[i];
    gaps += curve.gaps[i];
    const own = curve.count[i] - curve.gaps[i];
    if (!own) continue;
    if (curve.low[i] < low) low = curve.low[i];
    if (curve.high[i] > high) high = curve.high[i];
    sum += curve.mean[i] * own;
    finite += own;
  }
  const middle = (at + end - 1) >> 1;
  for (const name of ["step", "tokens", "seconds"]) found[name][to] = curve[name][middle];
  [found.count[to], found.gaps[to]] = [count, gaps];
  [found.low[to], found.high[to], found.mean[to]] = finite ? [low, high, sum / finite] : [NaN, NaN, NaN];
}

/** Data that stands in the page: arrays are compressed bytes in base64. */
class EmbeddedSource {
  constructor(data) {
    this.data = data;
    this.isLive = false;
    this.curves = new Map();
  }

  async runs() { return this.data.runs; }

  async run(id) { return this.data.run[id]; }

  async ranks(id) { return this.data.ranks[id] ?? null; }

  async window(id, name, first, last, columns) {
    const curve = await this.curve(id, name);
    return curve && cut(curve, first, last, columns);
  }

  /** Return a whole curve, unpacked once. */
  curve(id, name) {
    const packed = this.data.curves[id]?.[name];
    if (!packed) return Promise.resolve(null);
    const key = `${id}\n${name}`;
    if (!this.curves.has(key)) this.curves.set(key, this.unpack(packed));
    return this.curves.get(key);
  }

  async unpack(packed) {
    const arrays = await Promise.all(FIELDS.map((field) => packed[field] === undefined ? null : this.array(packed[field])));
    const curve = Object.fromEntries(FIELDS.map((field, i) => [field, arrays[i]]));
    curve.low ??= curve.mean;
    curve.high ??= curve.mean;
    curve.count ??= new Float32Array(curve.mean.length).fill(1);
    curve.gaps ??= new Float32Array(curve.mean.length);
    return curve;
  }

  /** Return the array at this place of the page's list. */
  array(place) {
    this.arrays ??= new Map();
    if (!this.arrays.has(place)) this.arrays.set(place, unpackArray(this.data.arrays[place]));
    return this.arrays.get(place);
  }
}

/** Return an array: bytes of float32 or float64, each value's bytes of the same weight together, deflated; or sums of differences. */
async function unpackArray(packed) {
  const deflated = Uint8Array.from(atob(packed.data), (letter) => letter.charCodeAt(0));
  const stream = new Blob([deflated]).stream().pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const width = packed.kind === "float32" ? 4 : 8;
  const length = planes.length / width;
  const joined = new Uint8Array(planes.length);
  for (let byte = 0; byte < width; byte++) {
    for (let i = 0; i < length; i++) joined[i * width + byte] = planes[byte * length + i];
  }
  if (packed.kind === "float32") return new Float32Array(joined.buffer);
  const values = new Float64Array(joined.buffer);
  for (let i = 1; i < length; i++) values[i] += values[i - 1];
  if (packed.unit !== 1) for (let i = 0; i < length; i++) values[i] *= packed.unit;
  return values;
}

/** Data of the dashboard's server, asked for as it is needed: the windows of a moment together, and of each only new buckets. */
class FetchedSource {
  constructor() {
    this.isLive = true;
    this.token = new URLSearchParams(location.search).get("token");
    if (this.token) history.replaceState(null, "", location.pathname);  // a cookie has it now
    [this.kept, this.versions, this.waiting] = [new Map(), new Map(), []];
  }

  async fetch(path, query = {}) {
    const url = new URL(path, location.href);
    for (const [name, value] of Object.entries(query)) url.searchParams.set(name, value);
    if (this.token) url.searchParams.set("token", this.token);
    const answer = await fetch(url, { cache: "no-store" });
    if (answer.status === 404) return null;
    if (!answer.ok) throw new Error(`the dashboard answered ${answer.status}`);
    return answer;
  }

  async ask(path, query) { return (await this.fetch(path, query))?.json() ?? null; }

  async runs() {
    const found = await this.ask("api/runs");
    this.versions = new Map(found.runs.map((run) => [run.id, run.version]));
    return found;
  }

  run(id) { return this.ask(`api/run/${encodeURIComponent(id)}`); }

  ranks(id) { return this.ask("api/ranks", { run: id }); }

  window(id, name, first, last, columns) {
    const asked = { run: id, name, first: Math.max(0, Math.floor(first)), last: Math.ceil(Math.min(last, 2 ** 53)), columns };
    const key = JSON.stringify(asked);
    const kept = this.kept.get(key);
    if (kept && kept.version === this.versions.get(id)) return Promise.resolve(kept.window);
    if (!this.waiting.length) queueMicrotask(() => this.send());
    return new Promise((resolve, reject) => this.waiting.push({ key, asked: { ...asked, had: kept?.had ?? null }, resolve, reject }));
  }

  /** Ask for the windows that wait, in addresses that a server accepts. */
  send() {
    const waiting = this.waiting;
    this.waiting = [];
    for (let begin = 0, end = 0; begin < waiting.length; begin = end) {
      for (let size = 0; end < waiting.length && (end === begin || size < 6000); end++) size += encodeURIComponent(JSON.stringify(waiting[end].asked)).length;
      this.sendSome(waiting.slice(begin, end));
    }
  }

  async sendSome(waiting) {
    try {
      const answer = await this.fetch("api/curves", { of: JSON.stringify(waiting.map(({ asked }) => asked)) });
      this.take(waiting, await answer.arrayBuffer());
    } catch (error) {
      for (const { reject } of waiting) reject(error);
    }
  }

  /** Read an answer, and join its buckets to those that were kept. */
  take(waiting, bytes) {
    const length = new DataView(bytes).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 4, length)));
    let at = 4 + length;
    const read = (kind, count) => {
      const values = new kind(bytes, at, count);
      at += values.byteLength;
      return values;
    };
    waiting.forEach(({ key, asked, resolve }, i) => {
      if (!header[i]) return resolve(null);
      const { keep, buckets, had } = header[i];
      const before = this.kept.get(key)?.window;
      const found = FIELDS.map((field) => [field, joined(before?.[field], keep, read(PLACES.has(field) ? Float64Array : Float32Array, buckets))]);
      at = Math.ceil(at / 8) * 8;
      const window = Object.fromEntries(found);
      this.kept.delete(key);
      this.kept.set(key, { window, had, version: this.versions.get(asked.run) });
      resolve(window);
    });
    for (const key of this.kept.keys()) {  // oldest first
      if (this.kept.size <= MOST_KEPT) break;
      this.kept.delete(key);
    }
  }
}

/** Return the first values of an array, then others. */
function joined(before, keep, after) {
  if (!keep) return after;
  const found = new after.constructor(keep + after.length);
  found.set(before.subarray(0, keep));
  found.set(after, keep);
  return found;
}

const embedded = document.getElementById("shoal-data");
const source = embedded ? new EmbeddedSource(JSON.parse(embedded.textContent)) : new FetchedSource();
const firstRuns = source.runs();  // asked for now, so that the server answers while the browser reads the scripts after this one
