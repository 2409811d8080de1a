// A block of code: highlighted where its language is known, with a button that copies it.

import { copyButton } from "./clipboard.js";
import { make } from "./page.js";
import bash from "./vendor/highlight.js/bash.min.js";
import c from "./vendor/highlight.js/c.min.js";
import hljs from "./vendor/highlight.js/core.min.js";
import cpp from "./vendor/highlight.js/cpp.min.js";
import css from "./vendor/highlight.js/css.min.js";
import go from "./vendor/highlight.js/go.min.js";
import java from "./vendor/highlight.js/java.min.js";
import javascript from "./vendor/highlight.js/javascript.min.js";
import json from "./vendor/highlight.js/json.min.js";
import python from "./vendor/highlight.js/python.min.js";
import rust from "./vendor/highlight.js/rust.min.js";
import sql from "./vendor/highlight.js/sql.min.js";
import xml from "./vendor/highlight.js/xml.min.js";
import yaml from "./vendor/highlight.js/yaml.min.js";

const LANGUAGES = { bash, c, cpp, css, go, java, javascript, json, python, rust, sql, xml, yaml };
const LONGEST = 4000; // characters that are highlighted; longer code is shown plain

for (const [name, grammar] of Object.entries(LANGUAGES)) hljs.registerLanguage(name, grammar);

/** <figure> with the code; `info` is what follows the opening fence. */
export function codeBlock(source, info) {
  const language = info.trim().split(/\s/)[0];
  const known = hljs.getLanguage(language) && source.length <= LONGEST;
  const code = make("code", {}, ...(known ? highlight(source, language) : [source]));
  const head = make("figcaption", {}, make("span", {}, language.slice(0, 20)), copyButton(() => source));
  return make("figure", { class: "code" }, head, make("pre", {}, code));
}

/** The source as nodes, made from highlight.js's tree instead of its HTML; flat, because an attacker may nest it deeply. */
function highlight(source, language) {
  const parts = [];
  const pending = [[hljs.highlight(source, { language, ignoreIllegals: true })._emitter.rootNode, null]];
  for (let pair = pending.pop(); pair; pair = pending.pop()) {
    const [node, scope] = pair;
    if (typeof node === "string") parts.push(make("span", { class: scope && scopeClass(scope) }, node));
    else pending.push(...node.children.toReversed().map((child) => [child, node.scope ?? scope]));
  }
  return parts;
}

/** "title.function" is drawn as a title. */
function scopeClass(scope) {
  return `code-${scope.split(".")[0]}`;
}
