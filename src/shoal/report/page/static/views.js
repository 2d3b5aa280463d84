"use strict";
// The sections about one run: what ran with what, where the time went, events, samples, and what differs between runs.

const STATES = { running: "▶ running", finished: "✓ finished", stopped: "■ stopped", crashed: "✕ crashed", "not started": "○ not started" };

/** Return a run's state: a sign and a word, so that the color is not needed. */
function stateView(state) {
  return el("span", { class: `state ${state === "crashed" ? "bad" : ""}` }, STATES[state] ?? state);
}

/** Return a list of names and values. */
function facts(pairs) {
  const shown = pairs.filter(([, value]) => value != null && value !== "" && value !== "–");
  return el("dl", { class: "facts" }, shown.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

/** Return the numbers to know first. */
function headline(run) {
  const total = run.total_steps ? ` of ${count(run.total_steps)}` : "";
  const left = run.state === "running" && run.seconds_left != null ? duration(run.seconds_left) : null;
  const pairs = [
    ["state", stateView(run.state)],
    ["phase", run.now && run.state === "running" ? phaseOf(run.now) : null],
    ["step", `${count(run.step)}${total}`],
    ["time left", left],
    ["training loss", run.loss == null ? null : `${number(run.loss)} nats/token`],
    ["best held-out loss", run.best_val_loss == null ? null : `${number(run.best_val_loss)} nats/token, step ${count(run.best_val_step)}`],
    ["tokens trained on", run.tokens == null ? null : metric(run.tokens)],
    ["throughput", run.tokens_per_second == null ? null : `${metric(run.tokens_per_second)} tokens/s`],
    ["MFU", run.mfu == null ? null : `${(100 * run.mfu).toFixed(1)}%`],
    ["goodput", run.goodput == null ? null : `${(100 * run.goodput).toFixed(1)}%`],
    ["restarts", run.restarts == null ? null : number(run.restarts)],
    ["cost", run.cost?.words ?? null],
  ];
  const progress = run.total_steps ? el("progress", { max: run.total_steps, value: run.step ?? 0, "aria-label": "steps taken" }) : null;
  return el("div", { class: "headline" }, progress, facts(pairs));
}

/** Return the phase of a running run in words. */
function phaseOf(now) {
  return now.total ? `${now.phase}, ${number(now.done)} of ${number(now.total)}` : now.phase;
}

/** Return what ran with what. */
function provenance(run) {
  const started = run.started_event ?? {};
  const git = started.git ? `${(started.git.commit ?? "").slice(0, 12)} on ${started.git.branch ?? "no branch"}, ${started.git.dirty ? "with changes that are not committed" : "clean"}` : "not a git repository, or not recorded";
  const gpus = started.gpus?.length ? gpusOf(started.gpus) : null;
  const versions = started.versions ?? started.machine ?? {};
  return el("div", {},
    facts([
      ["git", git],
      ["started", moment(run.started)],
      ["last line", moment(run.ended)],
      ["host", started.host],
      ["device", gpus ?? started.device_name ?? started.machine?.processor ?? started.device],
      ["processes", started.processes == null ? null : number(started.processes)],
      ["parameters", started.parameters == null ? null : metric(started.parameters) + (started.trainable_parameters != null && started.trainable_parameters !== started.parameters ? `, ${metric(started.trainable_parameters)} trained` : "")],
      ["tokens of a step", started.tokens_per_step == null ? null : count(started.tokens_per_step)],
      ["FLOP of a token", started.flops_per_token == null ? null : metric(started.flops_per_token, "FLOP")],
      ["versions", Object.entries(versions).map(([name, version]) => `${name} ${version}`).join(", ")],
    ]),
    started.command?.length ? el("div", {}, el("h3", {}, "Command"), el("pre", { tabindex: "0" }, started.command.map(quoted).join(" "))) : null,
    layoutView(run),
    run.model ? el("details", {}, el("summary", {}, "Model, as modules"), el("pre", { tabindex: "0" }, run.model)) : null,
    el("details", {}, el("summary", {}, "Config: all options"), table(["option", "value"], run.config.map(([key, value]) => [key, value]), { label: "Config" })));
}

/** Return "8 × NVIDIA H200 (141 GiB)". */
function gpusOf(gpus) {
  const counts = new Map();
  for (const gpu of gpus) {
    const name = `${gpu.name} (${bytes(gpu.memory_bytes)})`;
    counts.set(name, (counts.get(name) ?? 0) + 1);
  }
  return [...counts].map(([name, count]) => `${count} × ${name}`).join(", ");
}

/** Return a word as a shell reads it. */
function quoted(word) {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}

const AXIS_NAMES = { pp: "pipeline stage", dp_replicate: "replica", dp_shard: "shard", cp: "part of the sequence", tp: "tensor part" };

/** Return the layout as a grid of ranks: the innermost axis goes to the right, the others go down. */
function layoutView(run) {
  const axes = run.layout?.axes ?? [];
  if (!axes.length) return null;
  const used = axes.filter(([, size]) => size > 1);
  const ranks = axes.reduce((product, [, size]) => product * size, 1);
  const words = used.length ? used.map(([name, size]) => `${name} ${size}`).join(" × ") : "one process";
  const title = el("h3", {}, `Layout: ${words}`);
  if (ranks === 1) return el("div", {}, title);
  return el("div", {}, title, el("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Layout" }, rankGrid(used, Math.min(ranks, 256))),
    ranks > 256 ? el("p", { class: "quiet" }, `The first 256 of ${count(ranks)} ranks.`) : null);
}

/** Draw ranks by their coordinates along the axes. */
function rankGrid(used, ranks) {
  const [name, size] = used[used.length - 1];
  const columns = Math.min(size, 16);
  const outer = used.slice(0, -1);
  const [width, height, left, top] = [44, 24, outer.length ? 40 + 96 * outer.length : 40, 22];
  const rows = Math.ceil(ranks / columns);
  const picture = svg("svg", { class: "ranks", width: left + Math.max(columns * width, 190) + 2, height: top + rows * height + 2, role: "img", "aria-label": `${ranks} ranks by ${used.map(([each]) => each).join(", ")}` });
  picture.append(svg("text", { x: left, y: 14 }, `${AXIS_NAMES[name] ?? name} (${name}) →`));
  for (let rank = 0; rank < ranks; rank++) {
    const [x, y] = [left + (rank % columns) * width, top + Math.floor(rank / columns) * height];
    picture.append(svg("rect", { x, y, width: width - 3, height: height - 3, rx: 3, class: `cell shade${shadeOf(rank, used)}` }));
    picture.append(svg("text", { x: x + (width - 3) / 2, y: y + 15, class: "rank", "text-anchor": "middle" }, String(rank)));
    if (rank % size === 0 && outer.length) picture.append(svg("text", { x: 0, y: y + 15 }, coordinatesOf(rank, used).slice(0, -1).map(([each, at]) => `${each} ${at}`).join(", ")));
  }
  return picture;
}

/** Return the coordinates of a rank along the axes, outermost first. */
function coordinatesOf(rank, used) {
  const found = [];
  for (const [name, size] of [...used].reverse()) {
    found.unshift([name, rank % size]);
    rank = Math.floor(rank / size);
  }
  return found;
}

/** Return the shade of a rank: neighbors along the outermost axis differ. */
function shadeOf(rank, used) {
  return used.length > 1 ? coordinatesOf(rank, used)[0][1] % 2 : 0;
}

const SPENT_PLACES = { step: 0, start: 4, compile: 3, data: 5, evaluation: 2, checkpoint: 6, end: 6, lost: 1, idle: 6 };

/** Return a bar of where the seconds went, and its table. */
function goodputView(run) {
  const account = run.account;
  if (!account) return el("p", { class: "quiet" }, "No time was recorded yet (time.jsonl).");
  const parts = Object.entries(account.seconds).filter(([, seconds]) => seconds > 0).sort((a, b) => b[1] - a[1]);
  const bar = svg("svg", { class: "bar tall", viewBox: "0 0 1000 10", preserveAspectRatio: "none", role: "img", "aria-label": `Goodput ${(100 * account.goodput).toFixed(1)}%` });
  let left = 0;
  parts.forEach(([category, seconds], i) => {
    const width = (seconds / account.total_seconds) * 1000;
    bar.append(svg("rect", { x: left, y: 0, width: Math.max(width, 1), height: 10, fill: spentColor(category, i), stroke: cssColor("--page"), "stroke-width": 1 }, svg("title", {}, `${category}: ${duration(seconds)}`)));
    left += width;
  });
  const rows = parts.map(([category, seconds], i) => [
    el("span", {}, swatch(spentColor(category, i)), ` ${category}`), duration(seconds), `${(100 * seconds / account.total_seconds).toFixed(1)}%`, run.meanings?.[category] ?? "",
  ]);
  const lives = account.lives === 1 ? "one life" : `${account.lives} lives`;
  return el("div", {}, el("p", {}, el("b", {}, `Goodput ${(100 * account.goodput).toFixed(1)}%`), `: the share of ${duration(account.total_seconds)} in ${lives} that went into steps that count.`),
    bar, table(["category", "time", "share", "meaning"], rows, { label: "Where the time went" }));
}

function spentColor(category, i) {
  return styleOf(category === "step" ? 0 : category === "lost" ? 1 : 2 + (i % 5)).color;
}

/** Return the list of events; one with a step has a button that shows it in the charts. */
function eventsView(run, show) {
  if (!run.events.length) return el("p", { class: "quiet" }, "No events yet.");
  const rows = run.events.map((event) => [
    el("span", { class: "when" }, moment(event.time)),
    event.step == null ? "–" : el("button", { type: "button", class: "link", onclick: () => show(event.step) }, `step ${count(event.step)}`),
    el("span", { class: event.isBad ? "bad" : "" }, `${event.isBad ? "▼ " : "● "}${event.event}`),
    event.text,
  ]);
  return table(["time", "step", "event", "facts"], rows, { label: "Events" });
}

/** Return the largest spikes of the loss, each with documents of its step, if they were read, and the command that names them all. */
function spikesView(run, show) {
  if (!run.spikes?.length) return el("p", { class: "quiet" }, "No spike of the loss: no step stands out from those before it.");
  const rows = run.spikes.map((spike) => [
    el("button", { type: "button", class: "link", onclick: () => show(spike.step) }, `step ${count(spike.step)}`),
    number(spike.loss), number(spike.score, 3),
    el("div", {}, spike.documents.length > 0 && el("ul", {}, spike.documents.map((text) => el("li", {}, text))), el("code", {}, spike.command)),
  ]);
  return table(["step", "loss (nats/token)", "spike score (robust z)", "documents of the step"], rows, { label: "Spikes" });
}

/** Return the samples. */
function samplesView(run) {
  if (!run.samples.length) return el("p", { class: "quiet" }, "No sample was written yet.");
  return el("div", {}, run.samples.map((each) => el("figure", { class: "sampled" }, el("figcaption", {}, each.name), el("pre", { tabindex: "0" }, each.text))));
}

/** Return the options that differ between the shown runs. */
function differencesView(differences, runs) {
  const rows = differences.filter(({ values }) => new Set(runs.map((run) => values[run.id] ?? "–")).size > 1);
  if (runs.length < 2) return null;
  if (!rows.length) return el("p", {}, "The configs of the shown runs do not differ.");
  if (rows.length <= 6) {
    const line = (run) => [el("span", {}, sample(styleOf(run.place)), ` ${run.name}`), ...rows.map(({ values }) => values[run.id] ?? "–"), number(run.best_val_loss), number(run.loss)];
    return table(["run", ...rows.map(({ option }) => option), "best held-out loss (nats/token)", "last training loss (nats/token)"], runs.map(line), { label: "Options that differ" });
  }
  return table(["option", ...runs.map((run) => run.name)], rows.map(({ option, values }) => [option, ...runs.map((run) => values[run.id] ?? "–")]), { label: "Options that differ" });
}
