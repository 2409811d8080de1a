// What is no curve: the loads of experts, the samples and the arguments of runs.

import { make, number, word } from "./page.js";

function section(title, ...children) {
  return make("section", {}, make("h2", {}, title), make("div", { class: "scroll", tabindex: "0", "aria-label": title }, ...children));
}

/** Each layer's tokens by expert, in the last record that has them; null where the run has none. */
export function drawLoads({ name, load }) {
  if (!load) return null;
  const rows = load.layers.map((layer, i) => {
    const cells = layer.map((share) => {
      const cell = make("td", {}, number(share * layer.length, 2));
      cell.style.setProperty("--load", Math.min(2, share * layer.length));
      return cell;
    });
    return make("tr", {}, make("th", { scope: "row" }, word("layer", i + 1)), ...cells);
  });
  return section(word("experts", name, number(load.step)), make("table", { class: "loads" }, ...rows));
}

/** The texts that validations have generated and the last answers of reinforcement learning, newest first. */
export function drawSamples({ name, records, samples: rollouts }) {
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
  return section(word("samples", name), ...items);
}

/** The arguments of all runs side by side; those that differ are marked. */
export function drawArguments(runs) {
  const known = runs.filter(({ run }) => run?.arguments);
  if (!known.length) return null;
  const all = known.map(({ run }) => run.arguments);
  const rows = [...new Set(all.flatMap(Object.keys))].map((field) => {
    const values = all.map((one) => (typeof one[field] === "string" ? one[field] : JSON.stringify(one[field]) ?? ""));
    const differs = new Set(values).size > 1;
    const cells = values.map((value) => make("td", { class: differs ? "differs" : "" }, value));
    return make("tr", {}, make("th", { scope: "row" }, field), ...cells);
  });
  const head = [word("argument"), ...known.map(({ name }) => name)].map((text) => make("th", { scope: "col" }, text));
  return section(word("arguments"), make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)));
}
