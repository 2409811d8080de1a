// The models of the server, and which of them are asked.

import { ask } from "./api.js";
import { keep, kept, locale, make, number, word } from "./page.js";

const $ = (id) => document.getElementById(id);

let models = []; // as /v1/models has them, in the order in which they were trained
let chosen = kept("models", []);

export const chosenModels = () => chosen;
export const modelOf = (id) => models.find((model) => model.id === id);

export async function loadModels() {
  models = (await (await ask("v1/models")).json()).data.sort((a, b) => a.created - b.created);
  drawModels();
  return models;
}

export function drawModels() {
  const compare = $("compare").checked;
  const known = chosen.filter(modelOf);
  chosen = known.length ? known : models.slice(-1).map((model) => model.id);
  if (!compare) chosen = chosen.slice(0, 1);
  const chips = models.map((model) =>
    make(
      "label",
      { class: "chip" },
      make("input", { type: compare ? "checkbox" : "radio", name: "model", value: model.id, change: choose, ...(chosen.includes(model.id) && { checked: true }) }),
      make("span", {}, model.id),
      make("small", {}, size(model.parameters)),
    ),
  );
  $("models").replaceChildren($("models").firstElementChild, ...chips);
  $("compare").parentElement.hidden = models.length < 2;
  drawAbout();
}

function choose() {
  const ticked = [...$("models").querySelectorAll(":checked")].map((input) => input.value);
  chosen = ticked.length ? ticked : chosen.slice(0, 1);
  keep("models", chosen);
  if (!ticked.length) drawModels(); // one stays
  drawAbout();
}

function size(parameters) {
  return new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(parameters);
}

function drawAbout() {
  $("about").textContent = chosen.length === 1 && modelOf(chosen[0]) ? describe(modelOf(chosen[0])) : "";
}

function describe(model) {
  const saved = new Date(1000 * model.created).toLocaleString(locale(), { dateStyle: "medium", timeStyle: "short" });
  const kind = word(model.is_chat ? "kind_chat" : "kind_base");
  return word("about_model", model.id, kind, number(model.parameters), number(model.max_position_embeddings), saved);
}

/** Several models at once, or one. */
export function startCompare() {
  $("compare").checked = kept("compare", false);
  $("compare").addEventListener("change", () => {
    keep("compare", $("compare").checked);
    drawModels();
    keep("models", chosen);
  });
}
