// The turns of a chat on the page: questions, answers and what can be done with them.

import { copyButton } from "./clipboard.js";
import { parent, path } from "./conversations.js";
import { showMarkdown } from "./markdown.js";
import { make, number, word } from "./page.js";
import { scorePrompt, tokenView } from "./tokens.js";

const button = (key, click, more) => make("button", { type: "button", class: "quiet", "data-word": key, click, ...more });
const UNFINISHED = ["length", "stopped"];

/**
 * Draws chats in `list`. actions: ask(i, text) answers a text in a new version of turn number i; showVersion(i, at);
 * proceed(i, model) continues an answer; model() is the one that scores prompts.
 * Returns draw(chat), and changed(answer), for an answer that has grown.
 */
export function startTurns(list, actions) {
  const redrawing = new Map(); // an answer -> what shows it as it is now
  const waiting = new Set(); // answers that have grown since they were shown
  let pause = 0; // milliseconds until they are shown, so that drawing leaves most of the time to the reader

  function draw(chat) {
    redrawing.clear();
    const turns = path(chat);
    const shown = turns.map((turn, i) => drawTurn(chat, turn, i, i === turns.length - 1));
    const hello = make("li", { class: "hello" }, make("p", { "data-word": "hello" }), make("p", { class: "note", "data-word": "hello_more" }));
    list.replaceChildren(...(shown.length ? shown : [hello]));
    list.scrollTop = list.scrollHeight;
  }

  function drawTurn(chat, turn, i, isLast) {
    const answers = Object.entries(turn.answers).map(([model, answer]) =>
      drawAnswer(model, answer, isLast && (() => actions.proceed(i, model)), (show) => redrawing.set(answer, show)),
    );
    const tools = make("div", { class: "tools" }, button("regenerate", () => actions.ask(i, turn.text)), drawVersions(chat, i));
    return make("li", {}, drawQuestion(turn, i), make("div", { class: "answers" }, ...answers), tools);
  }

  function drawVersions(chat, i) {
    const { next, at } = parent(chat, i);
    if (next.length < 2) return null;
    const go = (label, text, to) => make("button", { type: "button", class: "quiet", "data-label": label, disabled: !next[to], click: () => actions.showVersion(i, to) }, text);
    return make("span", { class: "versions" }, go("version_before", "‹", at - 1), word("version", at + 1, next.length), go("version_after", "›", at + 1));
  }

  function drawQuestion(turn, i) {
    const heading = make("h2", { class: "unseen", "data-word": "you" });
    const question = make("div", { class: "question" }, heading, make("p", {}, turn.text));
    question.append(
      button("edit", () => edit(question, turn, i), { class: "quiet edit" }),
      button("surprise", () => toggleScores(question, turn.text), { "data-label": "surprise_more" }),
    );
    return question;
  }

  async function toggleScores(question, text) {
    const shown = question.querySelector(".tokens");
    if (shown) return shown.remove();
    const place = make("p", { class: "note tokens" }, "…");
    question.append(place);
    try {
      place.replaceWith(tokenView(await scorePrompt(actions.model(), text)));
    } catch (error) {
      place.textContent = error.message;
      place.classList.add("error");
    }
  }

  function edit(question, turn, i) {
    const area = make("textarea", { rows: "3", "data-label": "message", keydown: sendOnEnter });
    area.value = turn.text;
    const cancel = (event) => {
      event.stopPropagation();
      const again = drawQuestion(turn, i);
      form.replaceWith(again);
      again.querySelector(".edit").focus();
    };
    const resend = (event) => {
      event.preventDefault();
      if (area.value.trim()) actions.ask(i, area.value.trim());
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

  /** Shows an answer again, soon. */
  function changed(answer) {
    waiting.add(answer);
    if (waiting.size === 1) setTimeout(() => requestAnimationFrame(showChanged), pause);
  }

  function showChanged() {
    const began = performance.now();
    const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
    for (const answer of waiting) redrawing.get(answer)?.(); // none where another chat is open
    waiting.clear();
    if (atEnd) list.scrollTop = list.scrollHeight; // which also lays the page out
    pause = 4 * (performance.now() - began);
  }

  return { draw, changed };
}

/** The article of an answer. `register` receives the function that shows it as it is; `proceed` is false before other turns. */
function drawAnswer(model, answer, proceed, register) {
  const thought = make("details", { class: "part" }, make("summary", { "data-word": "thinking" }), make("p", {}));
  const [tools, body, error] = [make("div"), make("div", { class: "body" }), make("p", { class: "error", role: "alert" })];
  const note = make("span", { class: "note" });
  const more = proceed && button("continue", proceed, { class: "quiet continue" });
  const tokens = button("tokens_button", () => toggleTokens(body, answer), { class: "quiet" });
  const end = make("footer", {}, note, copyButton(() => (answer.given ?? "") + answer.content), tokens, more || null);
  function show() {
    thought.hidden = !answer.reasoning;
    thought.lastChild.textContent = answer.reasoning;
    const used = [...answer.runs, ...answer.calls.map((call) => ({ ...call, result: "" }))];
    if (tools.childElementCount !== used.length || answer.calls.length) tools.replaceChildren(...used.map(drawTool));
    if (answer.given === undefined) showMarkdown(answer.content, body);
    else body.replaceChildren(make("div", { class: "plain" }, make("span", { class: "given" }, answer.given), answer.content));
    error.textContent = answer.error ?? "";
    error.hidden = !answer.error;
    note.textContent = ending(answer);
    tokens.hidden = !answer.pieces;
    if (more) more.hidden = !answer.content || !(UNFINISHED.includes(answer.finish) || answer.error);
  }
  register(show);
  show();
  return make("article", { "aria-label": model }, make("h3", {}, model), thought, tools, body, error, end);
}

/** Shows the tokens in the place of the text, or the text again. */
function toggleTokens(body, answer) {
  const shown = body.nextElementSibling.classList.contains("tokens");
  if (shown) body.nextElementSibling.remove();
  else body.after(tokenView(answer.pieces));
  body.hidden = !shown;
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
  if (answer.first) parts.push(word("first", number(answer.first, 2)));
  if (answer.finish === "length") parts.push(word("cut"));
  if (answer.forgot) parts.push(word("forgot", answer.forgot));
  if (answer.finish === "stopped") parts.push(word("stopped"));
  return parts.join(" · ");
}

export function sendOnEnter(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // an input method takes Enter for itself
  event.preventDefault();
  event.target.form.requestSubmit();
}
