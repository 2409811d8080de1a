// The tokens of a text: where they begin and end, how probable each was, and what else the model expected there.

import { ask } from "./api.js";
import { make, number, word } from "./page.js";

const MOST_BITS = 6; // per byte; from there on a token has the full shade

// A piece: [text, log-probability, [[text, log-probability], …]]; that of a prompt also has the number of its bytes.

/** The pieces of a response's logprobs, in either endpoint's form. */
export function readPieces({ content, tokens, token_logprobs: logs, top_logprobs: tops }) {
  if (content) return content.map((one) => [...pairOf(one), one.top_logprobs.map(pairOf)]);
  return tokens.map((token, i) => [token, round(logs[i]), pairs(tops?.[i])]);
}

const round = (value) => Math.round(value * 1e4) / 1e4;
const pairs = (top) => Object.entries(top ?? {}).map(([token, log]) => [token, round(log)]);
const pairOf = ({ token, bytes, logprob }) => [bytes ? decode(bytes) : token, round(logprob)];

/** A token may be a part of a character: then its bytes are shown. */
function decode(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(new Uint8Array(bytes));
  } catch {
    return bytes.map((byte) => `<${byte.toString(16).toUpperCase().padStart(2, "0")}>`).join("");
  }
}

/** The pieces of a text that the model has only read. Tokens that share a character are one piece. */
export async function scorePrompt(model, text) {
  const body = JSON.stringify({ model, prompt: text, max_tokens: 0, echo: true, logprobs: 5 });
  const reply = await (await ask("v1/completions", { method: "POST", body })).json();
  const { token_logprobs: logs, top_logprobs: tops, text_offset: offsets } = reply.choices[0].logprobs;
  const characters = Array.from(reply.choices[0].text); // offsets count these
  const pieces = [];
  offsets.forEach((offset, i) => {
    const next = offsets[i + 1] ?? characters.length;
    if (i && offset === offsets[i - 1] && logs[i - 1] !== null) pieces.at(-1)[1] += logs[i];
    else pieces.push(["", logs[i], pairs(tops?.[i])]);
    if (next === offset) return;
    pieces.at(-1)[0] = characters.slice(offset, next).join("");
    pieces.at(-1)[3] = new TextEncoder().encode(pieces.at(-1)[0]).length;
  });
  return pieces.filter(([text, log]) => text || log !== null); // without the token that begins every text
}

const bits = (log) => -log / Math.LN2;
const percent = (log) => `${number(100 * Math.exp(log), 3)}%`;

/** The pieces in a row, and below them what is known of the one that was clicked. */
export function tokenView(pieces) {
  const detail = make("div", { class: "detail", "aria-live": "polite" });
  const buttons = pieces.map((piece, i) => {
    const button = make("button", { type: "button", tabindex: i ? "-1" : "0", class: "token", click: () => choose(i) }, visible(piece[0]));
    button.style.setProperty("--shade", shade(piece));
    return button;
  });
  function choose(i) {
    buttons.forEach((button, k) => button.setAttribute("aria-pressed", k === i));
    detail.replaceChildren(...describe(pieces[i]));
  }
  function move(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const next = buttons[buttons.indexOf(event.target) + by];
    if (!next) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
  const row = buttons.flatMap((button, i) => (pieces[i][0].includes("\n") ? [button, make("br")] : [button]));
  return make(
    "section",
    { class: "tokens", "data-label": "token_view" },
    make("p", { class: "note" }, summary(pieces)),
    make("div", { class: "pieces", role: "group", "data-label": "token_view", keydown: move }, ...row),
    detail,
  );
}

/** From 0, expected, to 1, a surprise: in bits per byte where the bytes are known, else by the probability. */
function shade([, log, , bytes]) {
  if (log === null) return 0;
  return bytes ? Math.min(1, bits(log) / bytes / MOST_BITS) : 1 - Math.exp(log);
}

function visible(text) {
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅";
}

function summary(pieces) {
  const known = pieces.filter(([, log]) => log !== null);
  const sum = known.reduce((total, [, log]) => total + bits(log), 0);
  const bytes = known.reduce((total, piece) => total + (piece[3] ?? 0), 0);
  if (bytes) return word("prompt_summary", number(pieces.length), number(sum / bytes, 3));
  return word("answer_summary", number(pieces.length), number(2 ** (sum / (known.length || 1)), 3));
}

function describe([text, log, top, bytes]) {
  if (log === null) return [make("p", { class: "note" }, word("first_token"))];
  const facts = [visible(text), percent(log), word("bits", number(bits(log), 3))];
  if (bytes) facts.push(word("bits_per_byte", number(bits(log) / bytes, 3)));
  const rows = top.map(([other, otherLog]) => {
    const bar = make("meter", { min: "0", max: "1", value: Math.exp(otherLog) });
    return make("tr", {}, make("th", { scope: "row" }, make("code", {}, visible(other))), make("td", {}, bar), make("td", { class: "figure" }, percent(otherLog)));
  });
  return [make("p", {}, make("code", {}, facts.shift()), ` ${facts.join(" · ")}`), make("table", { "data-label": "alternatives" }, ...rows)];
}
