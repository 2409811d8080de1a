// LaTeX: the delimiters in Markdown, and formulas as MathML, which the browser itself draws.

import { make } from "./page.js";

const { temml } = globalThis; // vendor/temml/temml.min.js, a classic script
const MATHML = "http://www.w3.org/1998/Math/MathML";
const LONGEST = 2000; // characters of a formula
const OPTIONS = { throwOnError: true, trust: false, maxExpand: 200, maxSize: [20, 200] };
const DEFINES = /\\(?:[gex]?def|(?:future)?let|(?:re|provide)?new|providecommand|renew)/; // macros can grow without bound
const TAGS = new Set(
  "math mrow mi mn mo ms mtext mspace mfrac msqrt mroot mstyle merror mpadded mphantom msub msup msubsup munder mover munderover mmultiscripts mprescripts none mtable mtr mtd menclose semantics".split(" "),
);
const DISPLAY = [
  ["$$", "$$"],
  ["\\[", "\\]"],
];
const INLINE = [...DISPLAY, ["\\(", "\\)"], ["$", "$"]];

/** Makes a markdown-it parser read formulas: tokens of type "math", with `block` where they stand on lines of their own. */
export function addMath(parser) {
  parser.inline.ruler.before("escape", "math", inlineRule);
  parser.block.ruler.before("fence", "math", blockRule, { alt: ["paragraph", "blockquote", "list"] });
}

function inlineRule(state, silent) {
  const pair = INLINE.find(([open]) => state.src.startsWith(open, state.pos));
  if (!pair) return false;
  const [open, close] = pair;
  const start = state.pos + open.length;
  const length = state.src.slice(start, start + LONGEST).indexOf(close);
  if (length <= 0) return false;
  const end = start + length;
  const source = state.src.slice(start, end);
  if (open === "$" && (/^\s|[\s\\]$/.test(source) || /\d/.test(state.src[end + 1]))) return false; // "$5 and $6"
  if (!silent) Object.assign(state.push("math", "", 0), { content: source, block: DISPLAY.includes(pair) });
  state.pos = end + close.length;
  return true;
}

function blockRule(state, first, end, silent) {
  const from = state.bMarks[first] + state.tShift[first];
  const pair = DISPLAY.find(([open]) => state.src.startsWith(open, from));
  if (!pair) return false;
  const [open, close] = pair;
  const start = from + open.length;
  const length = state.src.slice(start, start + LONGEST).indexOf(close);
  if (length < 0) return false;
  const closing = start + length;
  let last = first;
  while (last < end && state.eMarks[last] < closing) last++;
  if (last === end || state.src.slice(closing + close.length, state.eMarks[last]).trim()) return false;
  if (silent) return true;
  const lines = state.getLines(first, last + 1, state.blkIndent, false).trim(); // without the marks of quotes
  const content = lines.slice(open.length, lines.length - close.length);
  Object.assign(state.push("math", "", 0), { content, block: true, map: [first, last + 1] });
  state.line = last + 1;
  return true;
}

/** A formula as MathML; its source where it is wrong, or defines macros. */
export function formula(source, displayMode) {
  if (!DEFINES.test(source)) {
    try {
      return element(temml.__renderToMathMLTree(source, { ...OPTIONS, displayMode }));
    } catch {
      // not LaTeX, or too deep
    }
  }
  return make("code", { class: "formula" }, source);
}

/** The DOM of Temml's tree. Its own toNode() sets attributes named style, which the content security policy forbids. */
function element({ type, text, children = [], classes = [], attributes = {}, style = {} }) {
  if (text !== undefined) return document.createTextNode(text);
  const node = TAGS.has(type) ? document.createElementNS(MATHML, type) : document.createDocumentFragment();
  node.append(...children.map(element));
  if (!TAGS.has(type)) return node;
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") node.style.cssText += value;
    else if (!/^on|href|src/i.test(name)) node.setAttribute(name, value);
  }
  if (classes.some(Boolean)) node.setAttribute("class", classes.filter(Boolean).join(" "));
  Object.assign(node.style, style);
  return node;
}
