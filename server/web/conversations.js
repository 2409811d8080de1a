// Chats, each kept in this browser under a name of its own, so that two tabs do not overwrite each other's.
//
// A chat: {id, time, name, settings, next: [TURN, …], at}. `next` has the versions of the first turn, and `at` says which
// of them is shown. A turn: {text, answers: {MODEL: ANSWER}, next, at}, where `next` has the versions of the turn after it.
// So a question that is edited and an answer that is generated again keep what followed the earlier version.

import { keep, kept } from "./page.js";

const PREFIX = "jiezi.chat.";
const NUMBERS = ["tokens", "seconds", "first", "context", "forgot"];
const TEXTS = ["content", "reasoning", "given", "finish", "error"];

export function start(settings) {
  return { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), time: Date.now(), name: "", settings, next: [], at: 0 };
}

/** The turns that are shown. */
export function path(chat) {
  const turns = [];
  for (let turn = chat.next[chat.at]; turn; turn = turn.next[turn.at]) turns.push(turn);
  return turns;
}

/** What the versions of turn number i hang on: the turn before it, or the chat. */
export function parent(chat, i) {
  return i ? path(chat)[i - 1] : chat;
}

/** Adds a version of turn number i and shows it. */
export function addTurn(chat, i, text, models) {
  const blank = () => ({ content: "", reasoning: "", calls: [], runs: [] });
  const turn = { text, answers: Object.fromEntries(models.map((id) => [id, blank()])), next: [], at: 0 };
  const before = parent(chat, i);
  before.at = before.next.push(turn) - 1;
  return turn;
}

export function title(chat) {
  return chat.name || chat.next[0]?.text.trim().slice(0, 60) || "";
}

// ---- the browser's storage

export function conversations() {
  const names = Object.keys(localStorage).filter((name) => name.startsWith(PREFIX));
  const found = names.map((name) => read(kept(name.slice("jiezi.".length))));
  return found.filter(Boolean).sort((a, b) => b.time - a.time);
}

/** Whether there was room for it. */
export function store(chat) {
  return keep(`chat.${chat.id}`, chat);
}

export function isStored(chat) {
  return localStorage.getItem(PREFIX + chat.id) !== null;
}

export function forget(chat) {
  localStorage.removeItem(PREFIX + chat.id);
}

/** Whether a question, an answer or the name contains the words, whatever their case. */
export function matches(chat, words) {
  const texts = [chat.name];
  const pending = [...chat.next];
  for (let turn = pending.pop(); turn; turn = pending.pop()) {
    texts.push(turn.text, ...Object.values(turn.answers).map((answer) => answer.content));
    pending.push(...turn.next);
  }
  return texts.some((text) => text.toLowerCase().includes(words.toLowerCase()));
}

// ---- chats that come from storage or a file

/** A chat with fields of the right types, of data that may be anything; null where it is none. */
export function read(data) {
  if (!Array.isArray(data?.next)) return null;
  const chat = start(textFields(data.settings, Object.keys(data.settings ?? {})));
  if (typeof data.id === "string" && /^[\w-]{1,40}$/.test(data.id)) chat.id = data.id;
  if (Number.isFinite(data.time)) chat.time = data.time;
  if (typeof data.name === "string") chat.name = data.name.slice(0, 200);
  readTurns(data, chat);
  return chat;
}

/** Reads the turns behind `from` to hang them on `to`, without recursion: a chat may have thousands. */
function readTurns(from, to) {
  const pending = [[from, to]];
  for (let pair = pending.pop(); pair; pair = pending.pop()) {
    const [given, node] = pair;
    const turns = Array.isArray(given.next) ? given.next.filter((turn) => typeof turn?.text === "string") : [];
    node.next = turns.map(({ text, answers }) => ({ text, answers: readAnswers(answers), next: [], at: 0 }));
    node.at = Math.min(Math.max(0, Math.trunc(given.at) || 0), Math.max(0, node.next.length - 1));
    turns.forEach((turn, i) => pending.push([turn, node.next[i]]));
  }
}

function readAnswers(answers) {
  const pairs = Object.entries(answers ?? {}).filter(([, answer]) => typeof answer === "object" && answer);
  return Object.fromEntries(pairs.map(([model, answer]) => [model, readAnswer(answer)]));
}

function readAnswer(answer) {
  const found = { content: "", reasoning: "", ...textFields(answer, TEXTS) };
  for (const name of NUMBERS) if (Number.isFinite(answer[name])) found[name] = answer[name];
  for (const name of ["calls", "runs"]) found[name] = (Array.isArray(answer[name]) ? answer[name] : []).filter((one) => one && typeof one === "object");
  if (Array.isArray(answer.pieces)) found.pieces = answer.pieces.filter(isPiece);
  return found;
}

/** A token as tokens.js has them: [text, log-probability, [[text, log-probability], …]]. */
function isPiece(piece) {
  const isPair = (pair) => Array.isArray(pair) && typeof pair[0] === "string" && Number.isFinite(pair[1]);
  return isPair(piece) && Array.isArray(piece[2]) && piece[2].every(isPair);
}

function textFields(data, names) {
  return Object.fromEntries(names.filter((name) => typeof data?.[name] === "string").map((name) => [name, data[name]]));
}
