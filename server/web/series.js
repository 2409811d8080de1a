// From the records of runs to the charts: which fields share a chart, and what its curves are.

import { word } from "./page.js";
import { WORDS } from "./words.js";

const AXES = ["step", "tokens", "minutes"];
const NOT_DRAWN = [...AXES, "minutes_left"];
const FIRST = ["loss", "bits_per_byte", "accuracy", "reward"]; // charts in this order, then the others as they come
const DASHES = [undefined, "6 3", "2 3", "10 3 2 3"]; // by source
export const COLORS = 8; // in runs.css

/** The charts of some runs, {name, records, color}: [{field, source, title, yName, series}], as chart.js draws them. */
export function charts(runs, x) {
  const found = new Map(); // title -> chart
  const fields = new Set(runs.flatMap((run) => run.records.flatMap(Object.keys)));
  const sources = new Map(); // source -> its number
  for (const field of fields) {
    if (NOT_DRAWN.includes(field)) continue;
    const { name, source } = placeOf(field, fields);
    if (source && !sources.has(source)) sources.set(source, sources.size);
    for (const run of runs) {
      const points = pointsOf(run.records, x, field);
      if (!points.length) continue;
      const title = source ? word("by_source", name) : name;
      if (!found.has(title)) found.set(title, { title, yName: axisName(name), series: [] });
      found.get(title).series.push({
        name: runs.length > 1 ? `${run.name} ${field}` : field,
        color: run.color,
        bold: field.startsWith("val_"),
        dash: source && DASHES[sources.get(source) % DASHES.length],
        points,
      });
    }
  }
  const rank = ({ title }) => (FIRST.findIndex((name) => title.includes(name)) + FIRST.length + 1) % (FIRST.length + 1);
  return [...found.values()].sort((a, b) => rank(a) - rank(b));
}

/** Which chart a field belongs to, and which source it is of: "val_loss_zh" beside "val_loss" is of the source "zh". */
function placeOf(field, fields) {
  const whole = [...fields].find((other) => other.startsWith("val_") && field.startsWith(`${other}_`));
  return whole ? { name: whole.slice(4), source: field.slice(whole.length + 1) } : { name: field.replace(/^val_/, "") };
}

function pointsOf(records, x, field) {
  const points = records.map((record) => [record[x] ?? first(record, x), record[field]]);
  return points.filter((point) => point.every(Number.isFinite));
}

/** What a record before the first step lacks: then nothing has passed. */
function first(record, x) {
  return record.step === 0 && x !== "step" ? 0 : undefined;
}

function axisName(name) {
  return `y_${name}` in WORDS ? word(`y_${name}`) : name;
}
