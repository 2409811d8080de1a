// Live runs: the folders that the stages write, compared in charts; what is running is asked for again every few seconds.

import { ask } from "./api.js";
import { chart } from "./chart.js";
import { keep, kept, locale, make, number, startPage, word } from "./page.js";

const EVERY = 3000; // milliseconds between two questions
const AXES = ["step", "tokens", "minutes"];
const NOT_DRAWN = [...AXES, "minutes_left"];
const FIRST = ["loss", "bits_per_byte", "accuracy", "reward"]; // charts in this order, then the others as they come
const DASHES = [undefined, "6 3", "2 3", "10 3 2 3"]; // by source
const COLORS = 8; // in style.css
const $ = (id) => document.getElementById(id);
const controls = $("controls");

let runs = []; // as /api/runs has them
let chosen = kept("runs", []); // names
let picked = kept("runs") !== null; // until then the newest
const loaded = new Map(); // name -> {run, file, records, next, samples}
const charts = new Map(); // title -> chart

const url = (name, rest = "") => `api/runs/${name.split("/").map(encodeURIComponent).join("/")}${rest}`;
const get = async (path) => (await ask(path)).json();
const color = (name) => `color${chosen.indexOf(name) % COLORS}`;

/** Fetches what is new of a run; whether there was something. */
async function load(name) {
  let one = loaded.get(name) ?? { file: null, next: 0, records: [], samples: [] };
  const before = one.next;
  for (let more = true; more; ) {
    const part = await get(url(name, `?since=${one.next}`));
    if (one.file && one.file !== part.file) {
      one = { file: null, next: 0, records: [], samples: [] }; // it began anew
      continue;
    }
    for (const { expert_load: load, ...record } of part.records) {
      one.records.push(record);
      if (load) one.load = { step: record.step, layers: load }; // large, and only the last is shown
    }
    Object.assign(one, { file: part.file, next: part.next, run: part.run });
    ({ more } = part);
  }
  const news = one !== loaded.get(name) || one.next !== before;
  if (news) one.samples = await get(url(name, "/samples"));
  loaded.set(name, one);
  return news;
}

let locked = false; // the reader gives no key: then nobody asks again by himself
let last = Promise.resolve(); // one after the other: two at once would take the same records twice
function refresh(force = false) {
  last = last.then(async () => {
    try {
      await fetchAll(force);
    } catch (error) {
      locked = error.code === "invalid_api_key";
      $("status").textContent = error.message;
    }
  });
  return last;
}

async function fetchAll(force) {
  const found = await get("api/runs");
  const changed = JSON.stringify(found) !== JSON.stringify(runs);
  runs = found;
  if (!picked) chosen = runs.slice(0, 1).map((run) => run.name);
  chosen = chosen.filter((name) => runs.some((run) => run.name === name));
  const news = changed || force ? await Promise.all(chosen.map(load)) : [];
  $("status").textContent = runs.length ? (chosen.length ? "" : word("choose_runs")) : word("no_runs");
  if (changed || force) drawRuns();
  if (news.some(Boolean) || force) drawAll();
}

async function watch() {
  if (!document.hidden && !locked) await refresh();
  setTimeout(watch, EVERY);
}

// ---- the table of runs

function drawRuns() {
  const focused = document.activeElement?.value;
  const head = ["run", "state", "step", "loss", "updated"].map((name) =>
    make("th", { scope: "col", "data-word": name, class: ["step", "loss"].includes(name) ? "figure" : "" }),
  );
  const rows = runs.map((run) => {
    const { name, last } = run;
    const box = make("input", { type: "checkbox", value: name, change: choose, ...(chosen.includes(name) && { checked: true }) });
    const dot = make("span", { class: `swatch ${chosen.includes(name) ? color(name) : ""}` });
    const updated = new Date(1000 * run.updated).toLocaleString(locale(), { dateStyle: "short", timeStyle: "medium" });
    return make(
      "tr",
      {},
      make("th", { scope: "row" }, make("label", {}, box, " ", dot, " ", name)),
      make("td", { class: run.running ? "running" : "", "data-word": run.running ? "running" : "finished" }),
      make("td", { class: "figure" }, number(last.step)),
      make("td", { class: "figure" }, number(last.loss ?? last.val_loss)),
      make("td", {}, updated),
    );
  });
  $("runs").replaceChildren(make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
  if (focused) [...$("runs").querySelectorAll("input")].find((input) => input.value === focused)?.focus();
}

function choose(event) {
  const { value, checked } = event.target;
  chosen = checked ? [...chosen, value] : chosen.filter((name) => name !== value);
  picked = true;
  keep("runs", chosen);
  refresh(true);
}

// ---- the charts

/** Which chart a field belongs to, and which source it is of: "val_loss_zh" beside "val_loss" is of the source "zh". */
function placeOf(field, fields) {
  const name = field.replace(/^val_/, "");
  const whole = [...fields].find((other) => other.startsWith("val_") && field.startsWith(`${other}_`));
  return whole ? { title: word("by_source", whole.slice(4)), source: field.slice(whole.length + 1) } : { title: name };
}

function allSeries() {
  const x = controls.elements.x.value;
  const families = new Map(); // title -> series
  const shown = chosen.filter((name) => loaded.has(name));
  const fields = new Set(shown.flatMap((name) => loaded.get(name).records.flatMap(Object.keys)));
  const sources = new Map();
  for (const field of fields) {
    if (NOT_DRAWN.includes(field)) continue;
    const { title, source } = placeOf(field, fields);
    if (source && !sources.has(source)) sources.set(source, sources.size);
    for (const name of shown) {
      const points = loaded.get(name).records.filter((record) => Number.isFinite(record[field]) && Number.isFinite(record[x] ?? first(record, x)));
      if (!points.length) continue;
      families.set(title, families.get(title) ?? []);
      families.get(title).push({
        name: shown.length > 1 ? `${name} ${field}` : field,
        color: chosen.indexOf(name) % COLORS,
        bold: field.startsWith("val_"),
        dash: source && DASHES[sources.get(source) % DASHES.length],
        points: points.map((record) => [record[x] ?? first(record, x), record[field]]),
      });
    }
  }
  const rank = (title) => (FIRST.findIndex((name) => title.includes(name)) + FIRST.length + 1) % (FIRST.length + 1);
  return [...families].sort(([a], [b]) => rank(a) - rank(b));
}

/** What a record before the first step lacks: then nothing has passed. */
function first(record, x) {
  return record.step === 0 && x !== "step" ? 0 : undefined;
}

function drawCharts() {
  const families = allSeries();
  for (const [title, { figure }] of charts) {
    if (families.some(([name]) => name === title)) continue;
    figure.remove();
    charts.delete(title);
  }
  families.forEach(([title, series], i) => {
    if (!charts.has(title)) charts.set(title, chart());
    const { figure, draw } = charts.get(title);
    if ($("charts").children[i] !== figure) $("charts").insertBefore(figure, $("charts").children[i] ?? null);
    draw({ title, series, log: controls.elements.log.checked, xName: word(`x_${controls.elements.x.value}`) });
  });
}

// ---- what is no curve: loads of experts, samples, arguments

function drawLoads(name) {
  const load = loaded.get(name)?.load;
  if (!load) return null;
  const rows = load.layers.map((layer, i) => {
    const cells = layer.map((share) => {
      const cell = make("td", {}, number(share * layer.length, 2));
      cell.style.setProperty("--load", Math.min(2, share * layer.length));
      return cell;
    });
    return make("tr", {}, make("th", { scope: "row" }, word("layer", i + 1)), ...cells);
  });
  const table = make("table", { class: "loads" }, ...rows);
  const title = word("experts", name, number(load.step));
  return make("section", {}, make("h2", {}, title), make("div", { class: "scroll", tabindex: "0", "aria-label": title }, table));
}

function drawSamples(name) {
  const { records = [], samples: rollouts = [] } = loaded.get(name) ?? {};
  const texts = records.filter((record) => record.sample).map(({ step, sample }) => ({ step, written: sample }));
  const samples = [...texts, ...rollouts];
  if (!samples.length) return null;
  const items = samples.toReversed().map(({ step, written, reward, ...task }) =>
    make(
      "div",
      { class: "sample" },
      make("p", { class: "note" }, `${word("step")} ${number(step)}${reward === undefined ? "" : ` · ${word("reward")} ${number(reward)}`}`),
      make("p", {}, Object.values(task).map((value) => (typeof value === "string" ? value : JSON.stringify(value))).join(" · ")),
      make("pre", {}, String(written)),
    ),
  );
  const title = word("samples", name);
  return make("section", {}, make("h2", {}, title), make("div", { class: "scroll", tabindex: "0", "aria-label": title }, ...items));
}

function drawArguments() {
  const known = chosen.filter((name) => loaded.get(name)?.run?.arguments);
  if (!known.length) return null;
  const all = known.map((name) => loaded.get(name).run.arguments);
  const rows = [...new Set(all.flatMap(Object.keys))].map((field) => {
    const values = all.map((one) => (typeof one[field] === "string" ? one[field] : JSON.stringify(one[field]) ?? ""));
    const differs = new Set(values).size > 1;
    const cells = values.map((value) => make("td", { class: differs ? "differs" : "" }, value));
    return make("tr", {}, make("th", { scope: "row" }, field), ...cells);
  });
  const head = [word("argument"), ...known].map((text) => make("th", { scope: "col" }, text));
  const title = word("arguments");
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
  return make("section", {}, make("h2", {}, title), make("div", { class: "scroll", tabindex: "0", "aria-label": title }, table));
}

function drawAll() {
  drawCharts();
  const parts = [...chosen.map(drawLoads), ...chosen.map(drawSamples), drawArguments()];
  $("more").replaceChildren(...parts.filter(Boolean));
}

// ---- the page

startPage("title_runs", () => {
  drawRuns();
  drawAll();
});
const view = kept("view", { x: "step", log: false });
controls.elements.x.value = view.x;
controls.elements.log.checked = view.log;
controls.addEventListener("change", () => {
  keep("view", { x: controls.elements.x.value, log: controls.elements.log.checked });
  drawCharts();
});
watch();
