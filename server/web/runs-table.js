// The table of all runs, in which those are ticked that are drawn.

import { locale, make, number, word } from "./page.js";

const COLUMNS = ["run", "state", "step", "loss", "val_loss", "tokens_per_s", "minutes_left", "updated"];
const FIGURES = COLUMNS.slice(2, 7);

/** Fills the <table>. runs: as /api/runs has them; color(name): that of a chosen run, else null; choose(event): on a tick. */
export function drawRuns(table, runs, color, choose) {
  const focused = document.activeElement?.value;
  const head = COLUMNS.map((name) => make("th", { scope: "col", "data-word": name, class: FIGURES.includes(name) && "figure" }));
  const rows = runs.map((run) => make("tr", {}, nameCell(run, color(run.name), choose), ...cells(run)));
  table.replaceChildren(make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
  if (focused) [...table.querySelectorAll("input")].find((input) => input.value === focused)?.focus();
}

function nameCell({ name }, color, choose) {
  const box = make("input", { type: "checkbox", value: name, change: choose, checked: color !== null });
  return make("th", { scope: "row" }, make("label", {}, box, " ", make("span", { class: `swatch ${color ?? ""}` }), " ", name));
}

function cells({ running, last, updated }) {
  const texts = {
    state: word(running ? "running" : "finished"),
    step: number(last.step),
    loss: number(last.loss),
    val_loss: number(last.val_loss),
    tokens_per_s: number(last.tokens_per_s && Math.round(last.tokens_per_s)),
    minutes_left: running ? duration(last.minutes_left) : "",
    updated: new Date(1000 * updated).toLocaleString(locale(), { dateStyle: "short", timeStyle: "medium" }),
  };
  const look = (name) => (name === "state" && running ? "running" : FIGURES.includes(name) ? "figure" : null);
  return Object.entries(texts).map(([name, text]) => make("td", { class: look(name), "data-name": word(name) }, text));
}

function duration(minutes) {
  if (!Number.isFinite(minutes)) return "";
  if (minutes < 1) return word("seconds", Math.round(60 * minutes));
  return minutes < 100 ? word("minutes", number(minutes, 2)) : word("hours", number(minutes / 60, 2));
}
