// Live runs: the folders that the stages write, compared in charts; new records are requested every few seconds.

import { ask } from "./api.js";
import { chart } from "./chart.js";
import { keep, kept, make, startPage, word } from "./page.js";
import { drawArguments, drawLoads, drawSamples } from "./run-details.js";
import { drawRuns } from "./runs-table.js";
import { charts, COLORS } from "./series.js";

const EVERY = 3000; // milliseconds between two requests
const $ = (id) => document.getElementById(id);
const controls = $("controls");

let runs = []; // as /api/runs has them
let chosen = kept("runs", []); // names
let picked = kept("runs") !== null; // until then the newest
let hidden = kept("hidden_charts", []); // titles
const loaded = new Map(); // name -> {name, run, file, records, next, samples, load}
const drawn = new Map(); // title -> chart

const url = (name, rest = "") => `api/runs/${name.split("/").map(encodeURIComponent).join("/")}${rest}`;
const get = async (path) => (await ask(path)).json();
const colorOf = (name) => (chosen.includes(name) ? chosen.indexOf(name) % COLORS : null);
const blank = (name) => ({ name, file: null, next: 0, records: [], samples: [] });

// ---- what the server has

/** Fetches what is new of a run; whether there was something. */
async function load(name) {
  let one = loaded.get(name) ?? blank(name);
  const before = one.next;
  for (let more = true; more; ) {
    const part = await get(url(name, `?since=${one.next}`));
    if (one.file && one.file !== part.file) {
      one = blank(name); // it has started over
      continue;
    }
    for (const { expert_load: layers, ...record } of part.records) {
      one.records.push(record);
      if (layers) one.load = { step: record.step, layers }; // large, and only the last is shown
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
  if (changed || force) drawTable();
  if (news.some(Boolean) || force) drawAll();
}

async function watch() {
  if (!document.hidden && !locked) await refresh();
  setTimeout(watch, EVERY);
}

// ---- what is shown

function drawTable() {
  const color = (name) => (colorOf(name) === null ? null : `color${colorOf(name)}`);
  drawRuns($("runs"), runs, color, choose);
}

function choose(event) {
  const { value, checked } = event.target;
  chosen = checked ? [...chosen, value] : chosen.filter((name) => name !== value);
  picked = true;
  keep("runs", chosen);
  refresh(true);
}

const shownRuns = () => chosen.map((name) => loaded.get(name)).filter(Boolean);

function drawCharts() {
  const x = controls.elements.x.value;
  const all = charts(shownRuns().map((run) => ({ ...run, color: colorOf(run.name) })), x);
  drawSwitches(all.map(({ title }) => title));
  const shown = all.filter(({ title }) => !hidden.includes(title));
  for (const [title, { figure }] of drawn) {
    if (shown.some((one) => one.title === title)) continue;
    figure.remove();
    drawn.delete(title);
  }
  shown.forEach((one, i) => {
    if (!drawn.has(one.title)) drawn.set(one.title, chart());
    const { figure, draw } = drawn.get(one.title);
    if ($("charts").children[i] !== figure) $("charts").insertBefore(figure, $("charts").children[i] ?? null);
    draw({ ...one, log: controls.elements.log.checked, xName: word(`x_${x}`) });
  });
}

/** A box for each chart, by which it is shown or not. */
function drawSwitches(titles) {
  const shown = [...$("which").querySelectorAll("input")].map((input) => input.value);
  if (shown.join() === titles.join()) return; // so that the one with the focus keeps it
  const boxes = titles.map((title) => {
    const box = make("input", { type: "checkbox", value: title, checked: !hidden.includes(title) });
    box.addEventListener("change", () => {
      hidden = box.checked ? hidden.filter((name) => name !== title) : [...hidden, title];
      keep("hidden_charts", hidden);
    });
    return make("label", {}, box, ` ${title}`);
  });
  $("which").replaceChildren($("which").firstElementChild, ...boxes);
}

function drawAll() {
  drawCharts();
  const shown = shownRuns();
  const parts = [...shown.map(drawLoads), ...shown.map(drawSamples), drawArguments(shown)];
  $("more").replaceChildren(...parts.filter(Boolean));
}

// ---- the page

startPage("title_runs", () => {
  drawTable();
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
