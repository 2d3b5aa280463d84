"use strict";
// The page: the choices that its charts share, the list of runs, and the sections.

const CHARTS = [
  { id: "loss", title: "Loss", unit: "nats per token", height: 340, events: true, curves: (run, view) => [{ name: "loss", label: "training" }, ...(view.visible().length > 3 ? [] : [{ name: "val_loss", label: "held-out", marks: true }])] },
  { id: "held", title: "Held-out loss", axis: "loss", unit: "nats per token", curves: (run) => [{ name: "val_loss", label: "", marks: true }], needs: "val_loss" },
  { id: "bits", title: "Held-out loss per byte", axis: "loss", unit: "bits per byte", curves: () => [{ name: "val_bits_per_byte", label: "", marks: true }], needs: "val_bits_per_byte" },
  { id: "norm", title: "Gradient norm", unit: "", events: true, curves: () => [{ name: "grad_norm", label: "" }], needs: "grad_norm" },
  { id: "spike", title: "Spike score", unit: "robust z", neverLog: true, curves: () => [{ name: "spike_score", label: "" }], needs: "spike_score" },
  { id: "lr", title: "Learning rate", unit: "", fromZero: true, curves: () => [{ name: "lr", label: "" }], needs: "lr" },
  { id: "speed", title: "Throughput", unit: "tokens/s", fromZero: true, show: (v) => metric(v), curves: () => [{ name: "tokens_per_second", label: "" }], needs: "tokens_per_second" },
  { id: "mfu", title: "Model FLOPs utilization", axis: "MFU", unit: "%", fromZero: true, show: (v) => `${number(100 * v, 3)}%`, curves: () => [{ name: "mfu", label: "" }], needs: "mfu" },
  { id: "seconds", title: "Time of a step", unit: "seconds", fromZero: true, show: duration, curves: () => [{ name: "step_seconds", label: "" }], needs: "step_seconds" },
  { id: "memory", title: "Peak memory of process 0", axis: "memory", unit: "bytes", fromZero: true, show: bytes, curves: () => [{ name: "memory_bytes", label: "" }], needs: "memory_bytes" },
  { id: "sources", ofOne: true, title: "Training loss by source", axis: "loss", unit: "nats per token", curves: (run) => under(run, "source_loss/"), needs: "source_loss/" },
  { id: "held-sources", ofOne: true, title: "Held-out loss by source", axis: "loss", unit: "nats per token", curves: (run) => under(run, "val_source_loss/").map((curve) => ({ ...curve, marks: true })), needs: "val_source_loss/" },
  { id: "split", ofOne: true, title: "Phases of a step on process 0", axis: "time", unit: "seconds", fromZero: true, show: duration, curves: (run) => under(run, "split_seconds/").filter(({ label }) => label !== "step"), needs: "split_seconds/" },
];

/** Return the curves of a run whose names begin so. */
function under(run, prefix) {
  return run.curves.filter((name) => name.startsWith(prefix)).map((name) => ({ name, label: name.slice(prefix.length) }));
}

/** What is shown, and how: shared by all charts. */
class Page {
  constructor(source) {
    Object.assign(this, { source, axis: "step", smoothing: 0, logX: false, logY: false, fit: false, range: null, highlighted: null });
    Object.assign(this, { runs: [], differences: [], hidden: new Set(), detail: null, charts: [], line: Promise.resolve() });
  }

  async start() {
    const found = await firstRuns;
    this.take(found);
    this.detail = this.runs[0]?.id ?? null;
    this.build();
    this.say(reading(this.runs) ?? "");
    await this.showDetail();
    if (this.source.isLive) setTimeout(() => this.poll(), 2000);
  }

  take({ runs, differences }) {
    this.runs = runs.map((run, place) => ({ ...run, place }));
    this.differences = differences ?? [];
  }

  /** Return the run that the sections are about. */
  chosen() { return this.runs.filter((run) => run.id === this.detail); }

  visible() { return this.runs.filter((run) => !this.hidden.has(run.id)); }

  events() {
    return this.visible().length > 6 ? [] : this.visible().flatMap((run) => (run.marks ?? []).map((mark) => ({ ...mark, run: run.id })));
  }

  zoom(range) {
    this.range = range && range[1] > range[0] ? range : null;
    return this.reload();
  }

  follow(from, at) {
    for (const chart of this.charts) if (chart !== from) chart.follow(at);
  }

  /** Say something in the page's head. */
  say(text) { this.said.textContent = text; }

  reload() { return Promise.all(this.charts.map((chart) => chart.load())); }

  redraw() { for (const chart of this.charts) if (chart.width) chart.draw(); }

  /** Choose the horizontal axis; a range of another unit has no meaning on it. */
  choose(name, value) {
    this[name] = value;
    if (name !== "axis") return this.redraw();
    this.range = null;
    return this.reload();
  }

  // --- the frame ---

  build() {
    const title = this.runs.length === 1 ? this.runs[0].name : `${this.runs.length} runs`;
    document.title = `${title} · shoal`;
    this.list = el("nav", { class: "runs", "aria-label": "Runs" });
    this.sections = el("div", { class: "sections" });
    this.said = el("span", { class: "quiet", role: "status" });
    document.body.replaceChildren(
      el("a", { class: "skip", href: "#main" }, "Skip to the charts"),
      el("header", { class: "top" }, el("h1", {}, el("span", { class: "brand" }, "shoal"), " ", title), this.said, this.themeButton()),
      el("main", { id: "main", tabindex: "-1", class: this.runs.length > 1 ? "many" : "" }, this.runs.length > 1 ? this.list : null, this.sections));
    this.buildList();
    this.buildSections();
  }

  themeButton() {
    const words = () => (isDark() ? "☀ Light" : "☾ Dark");
    const button = el("button", { type: "button", onclick: () => this.setTheme(isDark() ? "light" : "dark") }, words());
    this.themed = () => { button.textContent = words(); };
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.recolor());
    addEventListener("beforeprint", () => { this.before = document.documentElement.dataset.theme; this.setTheme("light"); });
    addEventListener("afterprint", () => this.setTheme(this.before));
    return button;
  }

  setTheme(theme) {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    this.recolor();
  }

  recolor() {
    this.themed();
    this.buildList();
    this.redraw();
    this.fillDetail();
  }

  buildList() {
    const filter = this.filter ?? el("input", { type: "search", placeholder: "Filter runs", "aria-label": "Filter runs", oninput: () => this.buildList() });
    this.filter = filter;
    const wanted = filter.value.toLowerCase();
    const shown = this.runs.filter((run) => run.name.toLowerCase().includes(wanted));
    const all = el("button", { type: "button", onclick: () => this.showOnly(shown) }, "Show all");
    const none = el("button", { type: "button", onclick: () => this.showOnly([]) }, "Hide all");
    const items = shown.map((run) => this.runItem(run));
    const tools = this.runs.length > 5 ? [filter, el("div", { class: "tools" }, all, none)] : [];
    const focused = document.activeElement === filter;
    this.list.replaceChildren(el("h2", {}, "Runs"), ...tools, el("ul", {}, items));
    if (focused) filter.focus();
  }

  showOnly(runs) {
    const kept = new Set(runs.map((run) => run.id));
    this.hidden = new Set(this.runs.filter((run) => !kept.has(run.id)).map((run) => run.id));
    this.changedRuns();
  }

  runItem(run) {
    const box = el("input", { type: "checkbox", checked: !this.hidden.has(run.id), onchange: () => {
      box.checked ? this.hidden.delete(run.id) : this.hidden.add(run.id);
      this.changedRuns();
    } });
    const light = (id) => () => { this.highlighted = id; this.redraw(); };
    const loss = run.best_val_loss ?? run.loss;
    return el("li", { onmouseenter: light(run.id), onmouseleave: light(null) },
      el("label", {}, box, sample(styleOf(run.place)), el("span", { class: "name" }, run.name)),
      el("span", { class: "quiet" }, stateView(run.state), run.state === "running" ? ` · step ${count(run.step)}` : "", loss == null ? "" : ` · ${run.best_val_loss == null ? "loss" : "held-out"} ${number(loss)}`));
  }

  changedRuns() {
    this.buildList();
    this.reload();
    this.fillDifferences();
  }

  // --- the sections ---

  buildSections() {
    const has = (needs) => !needs || this.runs.some((run) => run.curves.some((name) => (needs.endsWith("/") ? name.startsWith(needs) : name === needs)));
    const specs = CHARTS.filter((spec) => has(spec.needs));
    this.charts = specs.map((spec) => new Chart(spec, this));
    const [loss, ...others] = this.charts;
    this.head = el("div", {});
    this.slots = Object.fromEntries(["provenance", "goodput", "ranks", "spikes", "events", "samples", "profile"].map((name) => [name, el("div", {})]));
    this.differing = el("section", {});
    const choose = el("select", { onchange: () => { this.detail = choose.value; this.showDetail(); for (const chart of this.charts) if (chart.spec.ofOne) chart.load(); } }, this.runs.map((run) => el("option", { value: run.id }, run.name)));
    const about = this.runs.length > 1 ? el("label", { class: "field" }, "About ", choose) : null;
    this.sections.replaceChildren(
      this.runs.length === 1 ? this.head : "",
      this.controls(),
      loss ? el("section", {}, el("h2", {}, "Learning"), loss.element, el("p", { class: "quiet hint" }, "Drag to zoom, double-click or 0 to reset; the pale band is the least and the greatest value of each pixel. ▼ trouble, ● other events.")) : "",
      this.differing,
      el("section", {}, el("h2", {}, "All curves"), el("div", { class: "charts" }, others.map((chart) => chart.element))),
      el("div", { class: "about" }, about, this.runs.length > 1 ? this.head : null,
        this.section("Spikes and their documents", "spikes"), this.section("Events and restarts", "events"),
        this.section("Ranks", "ranks"), this.section("Where the time went", "goodput"),
        this.section("What ran with what", "provenance"), this.section("Samples", "samples"), this.section("Profile", "profile")));
    this.fillDifferences();
  }

  section(title, name) { return el("section", { id: name }, el("h2", {}, title), this.slots[name]); }

  controls() {
    const choice = (label, name, options) => {
      const select = el("select", { onchange: () => this.choose(name, options[select.selectedIndex][1]) }, options.map(([text]) => el("option", {}, text)));
      return el("label", { class: "field" }, `${label} `, select);
    };
    const toggle = (label, name) => {
      const box = el("input", { type: "checkbox", onchange: () => this.choose(name, box.checked) });
      return el("label", { class: "field" }, box, ` ${label}`);
    };
    return el("div", { class: "controls", role: "group", "aria-label": "How the curves are shown" },
      choice("By", "axis", [["step", "step"], ["token", "tokens"], ["FLOP", "flop"], ["training time", "seconds"]]),
      choice("Smoothing", "smoothing", [["off", 0], ["light (0.3% of the width)", 0.3], ["medium (1%)", 1], ["strong (3%)", 3]]),
      toggle("log horizontal", "logX"), toggle("log vertical", "logY"), toggle("fit the curve, mark points beyond", "fit"));
  }

  fillDifferences() {
    const content = differencesView(this.differences, this.visible());
    this.differing.replaceChildren(...(content ? [el("h2", {}, "What differs in the configs"), content] : []));
  }

  async showDetail() {
    const id = this.detail;
    if (id == null) return;
    const [run, ranks] = await Promise.all([this.source.run(id), this.source.ranks(id)]);
    if (id !== this.detail || !run) return;
    this.about = { ...this.runs.find((each) => each.id === id), ...run, ranks, goodput: run.account?.goodput };
    this.fillDetail();
  }

  fillDetail() {
    const run = this.about;
    if (!run) return;
    const show = (step) => this.showStep(step);
    const content = {
      provenance: provenance(run), goodput: goodputView(run), ranks: ranksView(run.ranks), spikes: spikesView(run, show),
      events: eventsView(run, show), samples: samplesView(run),
    };
    this.head.replaceChildren(headline(run));
    for (const [name, node] of Object.entries(content)) this.slots[name].replaceChildren(node);
    this.slots.profile.parentNode.hidden = !run.profiles?.length;
    this.slots.profile.replaceChildren();
    if (run.profiles?.length) drawProfile(this.slots.profile, run.profiles);
  }

  /** Show a step in the middle of the charts. */
  showStep(step) {
    const total = this.about.step || step;
    const room = Math.max(5, total * 0.02);
    this.axis = "step";
    document.querySelector(".controls select").selectedIndex = 0;
    this.zoom([Math.max(0, step - room), step + room]);
    this.charts[0]?.plot.focus();
    this.charts[0]?.element.scrollIntoView({ block: "nearest" });
  }

  // --- live ---

  async poll() {
    try {
      const before = this.runs;
      const found = await this.source.runs();
      const isOther = found.runs.length !== before.length || found.runs.some((run, i) => run.id !== before[i].id || run.curves.length !== before[i].curves.length);
      const changed = found.runs.filter((run, i) => run.version !== before[i]?.version);
      this.take(found);
      if (isOther) this.build();
      if (changed.length) this.update();
      this.say(reading(this.runs) ?? `live · ${new Date().toLocaleTimeString("sv-SE")}`);
    } catch {
      this.say("the dashboard does not answer; trying again");
    }
    setTimeout(() => this.poll(), 2000);
  }

  update() {
    for (const chart of this.charts) chart.forget();
    this.buildList();
    this.reload();
    this.showDetail();
  }
}

/** Return how far the logs of runs that were never shown before were read; null if all were. */
function reading(runs) {
  const left = runs.filter((run) => run.read != null);
  if (!left.length) return null;
  const done = runs.length - left.length + left.reduce((sum, run) => sum + run.read, 0);
  return `reading the logs: ${Math.floor((100 * done) / runs.length)}%, ${number(left.length)} of ${number(runs.length)} runs to go`;
}

const page = new Page(source);
const started = page.start();
