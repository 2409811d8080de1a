// The chat: turns, each a message and the answers of one model or of several side by side, kept in this browser.
//
// A conversation: {id, time, turns: [{text, answers: {MODEL: {content, reasoning, calls, runs, given, …}}}]}

import { ask, stream } from "./api.js";
import { keep, kept, locale, make, number, startPage, word } from "./page.js";

const SAMPLING = ["temperature", "top_p", "max_tokens", "seed"];
const $ = (id) => document.getElementById(id);
const [composer, text, turns, status] = ["composer", "text", "turns", "status"].map($);

let models = []; // as /v1/models has them, in the order in which they were trained
let chosen = kept("models", []);
let conversation = start();
let generating = null; // the AbortController of the answers in progress

function start() {
  return { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), time: Date.now(), turns: [] };
}

// ---- what is kept: each conversation under a name of its own, so that two tabs do not undo each other's

function conversations() {
  const names = Object.keys(localStorage).filter((name) => name.startsWith("jiezi.chat."));
  const found = names.map((name) => kept(name.slice("jiezi.".length))).filter((one) => Array.isArray(one?.turns));
  return found.sort((a, b) => b.time - a.time);
}

function save(one) {
  one.time = Date.now();
  if (!keep(`chat.${one.id}`, one)) status.textContent = word("storage_full");
  drawHistory();
}

function open(one) {
  generating?.abort();
  conversation = one;
  keep("open", one.id);
  toggleMenu(false);
  draw();
  drawHistory();
  text.focus();
}

function forget(one) {
  localStorage.removeItem(`jiezi.chat.${one.id}`);
  if (one.id === conversation.id) open(start());
  else drawHistory();
}

function drawHistory() {
  const all = conversations();
  $("conversations").replaceChildren(
    ...all.map((one) => {
      const title = one.turns[0]?.text.slice(0, 60) ?? "";
      return make(
        "li",
        {},
        make("button", { type: "button", "aria-current": one.id === conversation.id && "true", click: () => open(one) }, title),
        make("button", { type: "button", "aria-label": word("delete_one", title), click: () => forget(one) }, "×"),
      );
    }),
  );
  $("delete_all").hidden = !all.length;
}

function toggleMenu(shown) {
  $("history").classList.toggle("open", shown);
  $("menu").setAttribute("aria-expanded", shown);
}

// ---- models and settings

function drawModels() {
  const compare = $("compare").checked;
  const known = chosen.filter((id) => models.some((model) => model.id === id));
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
  $("about").textContent = chosen
    .map((id) => models.find((model) => model.id === id))
    .map((model) => {
      const saved = new Date(1000 * model.created).toLocaleString(locale(), { dateStyle: "medium", timeStyle: "short" });
      const kind = word(model.is_chat ? "kind_chat" : "kind_base");
      return word("about_model", model.id, kind, number(model.parameters), number(model.max_position_embeddings), saved);
    })
    .slice(0, chosen.length > 1 ? 0 : 1)
    .join("");
}

async function loadModels() {
  try {
    models = (await (await ask("v1/models")).json()).data.sort((a, b) => a.created - b.created);
    status.textContent = models.length ? "" : word("no_models");
  } catch (error) {
    status.textContent = error.message;
  }
  drawModels();
}

function settings() {
  const fields = [...SAMPLING, "system"].map((name) => [name, composer.elements[name].value.trim()]);
  return Object.fromEntries(fields.filter(([, value]) => value !== ""));
}

// ---- the conversation on the page

const redrawing = new Map(); // an answer in progress -> what shows it as it is now

function draw() {
  redrawing.clear();
  const shown = conversation.turns.map((turn, i) => drawTurn(turn, i));
  const hello = make("li", { class: "hello" }, make("p", { "data-word": "hello" }), make("p", { class: "note", "data-word": "hello_more" }));
  turns.replaceChildren(...(shown.length ? shown : [hello]));
  turns.scrollTop = turns.scrollHeight;
}

function drawTurn(turn, i) {
  const answers = Object.entries(turn.answers).map(([model, answer]) => drawAnswer(model, answer));
  const again = make("button", { type: "button", class: "quiet", "data-word": "regenerate", click: () => send(turn.text, i) });
  const last = i === conversation.turns.length - 1;
  return make("li", {}, drawQuestion(turn, i), make("div", { class: "answers" }, ...answers), last ? again : null);
}

function drawQuestion(turn, i) {
  const question = make("div", { class: "question" }, make("h2", { class: "unseen", "data-word": "you" }), make("p", {}, turn.text));
  question.append(make("button", { type: "button", class: "quiet", "data-word": "edit", click: () => edit(question, turn, i) }));
  return question;
}

function edit(question, turn, i) {
  const area = make("textarea", { rows: "3", "data-label": "message", keydown: sendOnEnter });
  area.value = turn.text;
  const cancel = (event) => {
    event.stopPropagation();
    const again = drawQuestion(turn, i);
    form.replaceWith(again);
    again.lastChild.focus();
  };
  const resend = (event) => {
    event.preventDefault();
    if (area.value.trim()) send(area.value.trim(), i);
    text.focus();
  };
  const form = make(
    "form",
    { class: "question", submit: resend, keydown: (event) => event.key === "Escape" && cancel(event) },
    area,
    make("button", { class: "main", "data-word": "send" }),
    make("button", { type: "button", "data-word": "cancel", click: cancel }),
  );
  question.replaceWith(form);
  area.focus();
}

function drawAnswer(model, answer) {
  const thought = make("details", { class: "part" }, make("summary", { "data-word": "thinking" }), make("p", {}));
  const [tools, body, error] = [make("div"), make("div", { class: "body" }), make("p", { class: "error", role: "alert" })];
  const end = make("p", { class: "note" });
  function show() {
    thought.hidden = !answer.reasoning;
    thought.lastChild.textContent = answer.reasoning;
    const used = [...answer.runs, ...answer.calls.map((call) => ({ ...call, result: "" }))];
    if (tools.childElementCount !== used.length || answer.calls.length) tools.replaceChildren(...used.map(drawTool));
    body.replaceChildren(...(answer.given ? [make("span", { class: "given" }, answer.given)] : []), ...blocks(answer.content));
    error.textContent = answer.error ?? "";
    error.hidden = !answer.error;
    end.textContent = ending(answer);
  }
  redrawing.set(answer, show);
  show();
  return make("article", { "aria-label": model }, make("h3", {}, model), thought, tools, body, error, end);
}

function drawTool({ name, arguments: given, result }) {
  const shown = typeof given === "string" ? given : JSON.stringify(given);
  return make(
    "details",
    { class: "part", open: true },
    make("summary", {}, word("tool", name ?? "?")),
    make("p", {}, make("code", {}, shown), ...(result === "" ? [] : [" → ", make("code", {}, String(result))])),
  );
}

function ending(answer) {
  const parts = [];
  if (answer.tokens) parts.push(word("tokens", number(answer.tokens)));
  if (answer.tokens && answer.seconds) parts.push(word("speed", number(answer.tokens / answer.seconds, 3)));
  if (answer.finish === "length") parts.push(word("cut"));
  if (answer.forgot) parts.push(word("forgot", answer.forgot));
  if (answer.finish === "stopped") parts.push(word("stopped"));
  return parts.join(" · ");
}

/** Text, and as <pre> the text between fences of ```. */
function blocks(content) {
  return content.split(/^```.*\n?/m).map((part, i) => (i % 2 ? make("pre", {}, make("code", {}, part)) : make("span", {}, part)));
}

// ---- asking

/** Answers `message` as turn number i, in the place of that turn and those behind it. */
async function send(message, i = conversation.turns.length) {
  if (!chosen.length) return;
  generating?.abort();
  const controller = (generating = new AbortController());
  const [asked, fields] = [conversation, settings()];
  asked.turns.length = i;
  const blank = () => ({ content: "", reasoning: "", calls: [], runs: [] });
  const turn = { text: message, answers: Object.fromEntries(chosen.map((id) => [id, blank()])) };
  asked.turns.push(turn);
  keep("open", asked.id);
  save(asked);
  draw();
  showWriting(true);
  await Promise.all(chosen.map((id) => answer(id, asked, i, turn.answers[id], fields, controller.signal)));
  if (kept(`chat.${asked.id}`)) save(asked); // unless it has been deleted
  if (generating === controller) {
    generating = null;
    showWriting(false);
  }
}

function showWriting(now) {
  $("send").hidden = now;
  $("stop").hidden = !now;
  turns.setAttribute("aria-busy", now); // a screen reader reads the answer when it is whole
}

/** Writes one model's answer to turn number i into `answer`. */
async function answer(id, { turns: all }, i, answer, { system, ...sampling }, signal) {
  const model = models.find((one) => one.id === id);
  const body = { model: id, stream: true, stream_options: { include_usage: true } };
  for (const [name, value] of Object.entries(sampling)) body[name] = Number(value);
  const before = all.slice(0, i).filter((turn) => turn.answers[id]?.content);
  const began = performance.now();
  for (let again = true; again; ) {
    again = false;
    if (model.is_chat) body.messages = messages(system, before, id, all[i].text);
    else body.prompt = answer.given = all[i].text;
    try {
      for await (const chunk of stream(model.is_chat ? "v1/chat/completions" : "v1/completions", body, signal)) {
        const choice = chunk.choices?.[0];
        if (choice) add(answer, choice.delta ?? choice, choice.finish_reason);
        if (chunk.usage) answer.tokens = chunk.usage.completion_tokens;
        show(answer);
      }
    } catch (error) {
      again = error.code === "context_length_exceeded" && before.length > 0;
      if (again) {
        before.shift(); // as eval.py does
        answer.forgot = (answer.forgot ?? 0) + 1;
      } else if (signal.aborted) answer.finish = "stopped";
      else answer.error = error.message;
    }
  }
  answer.seconds = (performance.now() - began) / 1000;
  show(answer);
}

function messages(system, before, id, message) {
  const past = before.flatMap((turn) => [
    { role: "user", content: turn.text },
    { role: "assistant", content: turn.answers[id].content },
  ]);
  return [...(system ? [{ role: "system", content: system }] : []), ...past, { role: "user", content: message }];
}

function add(answer, delta, finish) {
  answer.content += delta.content ?? delta.text ?? "";
  answer.reasoning += delta.reasoning_content ?? "";
  answer.runs.push(...(delta.tool_runs ?? []));
  for (const part of delta.tool_calls ?? []) {
    const call = (answer.calls[part.index ?? answer.calls.length] ??= { name: "", arguments: "" });
    call.name += part.function?.name ?? "";
    call.arguments += part.function?.arguments ?? "";
  }
  if (finish) answer.finish = finish;
}

function show(answer) {
  const atEnd = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 80;
  redrawing.get(answer)?.(); // none where another conversation is open
  if (atEnd) turns.scrollTop = turns.scrollHeight;
}

function sendOnEnter(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // an input method takes Enter for itself
  event.preventDefault();
  event.target.form.requestSubmit();
}

// ---- the page

startPage("title_chat", () => {
  draw();
  drawHistory();
  drawModels();
});
for (const [name, value] of Object.entries(kept("settings", {}))) composer.elements[name].value = value;
$("compare").checked = kept("compare", false);
composer.addEventListener("input", () => keep("settings", settings()));
$("compare").addEventListener("change", () => (keep("compare", $("compare").checked), drawModels(), keep("models", chosen)));
text.addEventListener("keydown", sendOnEnter);
composer.addEventListener("submit", (event) => {
  event.preventDefault();
  if (generating || !text.value.trim() || !composer.reportValidity()) return;
  send(text.value.trim());
  text.value = "";
});
$("stop").addEventListener("click", () => (generating?.abort(), text.focus()));
$("new").addEventListener("click", () => open(start()));
$("menu").addEventListener("click", () => toggleMenu(!$("history").classList.contains("open")));
$("delete_all").addEventListener("click", () => {
  if (!confirm(word("delete_all_sure"))) return;
  conversations().forEach((one) => localStorage.removeItem(`jiezi.chat.${one.id}`));
  open(start());
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  generating?.abort();
  toggleMenu(false);
});
addEventListener("pagehide", () => generating && save(conversation)); // the answer so far
conversation = conversations().find((one) => one.id === kept("open")) ?? conversation;
draw();
drawHistory();
text.focus();
loadModels();
