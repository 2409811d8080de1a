// The chat page: what happens when something is asked, opened or set. The parts are in the files that it imports.

import { startAttach } from "./attach.js";
import { copy } from "./clipboard.js";
import { addTurn, conversations, isStored, parent, path, start, store } from "./conversations.js";
import { generate } from "./generate.js";
import { startHistory } from "./history.js";
import { chosenModels, drawModels, loadModels, modelOf, startCompare } from "./models.js";
import { keep, kept, make, number, startPage, word } from "./page.js";
import { DEFAULTS, fillSettings, readSettings } from "./settings.js";
import { showSheet, startShortcuts } from "./shortcuts.js";
import { sendOnEnter, startTurns } from "./turns.js";

const $ = (id) => document.getElementById(id);
const [composer, text, list, status] = ["composer", "text", "turns", "status"].map($);
const say = (message) => (status.textContent = message);

let chat = start(kept("settings", DEFAULTS)); // the one that is open
let generating = null; // the AbortController of the answers in progress

const turns = startTurns(list, { ask, proceed, showVersion, model: () => chosenModels()[0] });
const drawHistory = startHistory({
  current: () => chat.id,
  open: (one = start(kept("settings", DEFAULTS))) => open(one),
  renamed: ({ id, name }) => id === chat.id && (chat.name = name),
  say,
});

function draw() {
  turns.draw(chat);
  drawMeter();
}

function open(one) {
  generating?.abort();
  chat = one;
  keep("open", chat.id);
  fillSettings(composer, chat.settings);
  toggleMenu(false);
  draw();
  drawHistory();
  text.focus();
}

function save(one) {
  one.time = Date.now();
  if (!store(one)) say(word("storage_full"));
  drawHistory();
}

/** How much of the context the last answers have taken. */
function drawMeter() {
  const [turn] = path(chat).slice(-1);
  const used = Object.entries(turn?.answers ?? {}).filter(([id, answer]) => answer.context && modelOf(id));
  const shares = used.map(([id, { context }]) => [context, modelOf(id).max_position_embeddings]);
  const [most] = shares.sort((a, b) => b[0] / b[1] - a[0] / a[1]);
  $("context").hidden = !most;
  if (!most) return;
  const [tokens, limit] = most;
  const meter = make("meter", { min: "0", max: limit, high: 0.9 * limit, low: 0.7 * limit, optimum: "0", value: tokens });
  $("context").replaceChildren(word("context", number(tokens), number(limit)), meter);
}

// ---- asking

/** Answers a message in a new version of turn number i, the next one by default. */
function ask(i, message) {
  if (!chosenModels().length) return;
  const turn = addTurn(chat, i, message, chosenModels());
  keep("open", chat.id);
  save(chat);
  write(i, turn, chosenModels());
  text.focus();
}

function proceed(i, id) {
  const turn = path(chat)[i];
  if (modelOf(id)) write(i, turn, [id]);
  else say(word("model_gone", id));
}

function showVersion(i, at) {
  generating?.abort();
  parent(chat, i).at = at;
  save(chat);
  draw();
}

/** Lets the models write their answers to a turn. */
async function write(i, turn, ids) {
  generating?.abort();
  const controller = (generating = new AbortController());
  const asked = chat;
  const common = { before: path(chat).slice(0, i), text: turn.text, settings: chat.settings, probabilities: $("probabilities").checked };
  draw();
  showWriting(true);
  const answers = ids.map((id) => {
    const answer = turn.answers[id];
    return generate({ ...common, model: modelOf(id), answer, signal: controller.signal, changed: () => turns.changed(answer) });
  });
  await Promise.all(answers);
  if (isStored(asked)) save(asked); // unless it has been deleted
  if (generating !== controller) return;
  generating = null;
  showWriting(false);
  drawMeter();
}

function showWriting(now) {
  $("send").hidden = now;
  $("stop_button").hidden = !now;
  list.setAttribute("aria-busy", now); // a screen reader reads the answer when it is whole
}

// ---- the page

function toggleMenu(shown) {
  $("history").classList.toggle("open", shown);
  $("menu").setAttribute("aria-expanded", shown);
}

function changeSettings() {
  chat.settings = readSettings(composer);
  keep("settings", chat.settings);
  if (isStored(chat)) store(chat);
}

function insert(more) {
  text.setRangeText(more, text.selectionStart, text.selectionEnd, "end");
  text.focus();
}

/** Clicks the last button that fits, as the shortcuts do. */
function clickLast(selector) {
  if (!generating) [...list.querySelectorAll(selector)].findLast((button) => !button.hidden)?.click();
}

startPage("title_chat", () => {
  draw();
  drawHistory();
  drawModels();
});
startCompare();
startAttach(document.body, $("attach"), insert, say);
startShortcuts({
  new_chat: () => $("new").click(),
  search: () => (toggleMenu(true), $("search").focus()),
  regenerate: () => clickLast('[data-word="regenerate"]'),
  copy_answer: () => copy(Object.values(path(chat).at(-1)?.answers ?? {}).map((answer) => (answer.given ?? "") + answer.content).join("\n\n")),
  tokens_button: () => clickLast('[data-word="tokens_button"]'),
  edit_last: () => clickLast(".edit"),
  settings: () => $("settings").toggleAttribute("open"),
  attach: () => $("attach").click(),
});

$("probabilities").checked = kept("probabilities", false);
$("probabilities").addEventListener("change", () => keep("probabilities", $("probabilities").checked));
$("settings").addEventListener("input", changeSettings);
$("reset").addEventListener("click", () => (fillSettings(composer, DEFAULTS), changeSettings()));
text.addEventListener("keydown", sendOnEnter);
composer.addEventListener("submit", (event) => {
  event.preventDefault();
  if (generating || !text.value.trim() || !composer.reportValidity()) return;
  const message = text.value.trim();
  text.value = "";
  ask(path(chat).length, message);
});
$("stop_button").addEventListener("click", () => (generating?.abort(), text.focus()));
$("new").addEventListener("click", () => open(start(kept("settings", DEFAULTS))));
$("keys").addEventListener("click", showSheet);
$("menu").addEventListener("click", () => toggleMenu(!$("history").classList.contains("open")));
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  generating?.abort();
  toggleMenu(false);
});
addEventListener("pagehide", () => generating && save(chat)); // the answer so far

open(conversations().find((one) => one.id === kept("open")) ?? chat);
loadModels().then(
  (models) => {
    say(models.length ? "" : word("no_models"));
    drawMeter();
  },
  (error) => say(error.message),
);
