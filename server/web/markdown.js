// Markdown as elements. No HTML is made on the way: markdown-it's tokens become nodes of the kinds that are listed here.

import { codeBlock } from "./code.js";
import { addMath, formula } from "./math.js";
import { make } from "./page.js";
import markdownit from "./vendor/markdown-it/markdown-it.esm.min.mjs";

const LONGEST = 100_000; // characters; a longer text is shown as it is
const EMPTY_ITEM = /^\s*\d+[.)]\s*$/; // "25." is an answer, not a list
const LEAVES = {
  text: (token) => token.content,
  softbreak: () => make("br"),
  hardbreak: () => make("br"),
  code_inline: (token) => make("code", {}, token.content),
  fence: (token) => codeBlock(token.content, token.info),
  math: (token) => (token.block ? make("div", { class: "display" }, formula(token.content, true)) : formula(token.content, false)),
  image: (token) => link(token.attrGet("src"), token.content || token.attrGet("src")), // nothing is fetched
  hr: () => make("hr"),
};
const TAGS = new Set("p h1 h2 h3 h4 h5 h6 ul ol li blockquote table thead tbody tr th td strong em s a".split(" "));

const parser = markdownit({ html: false, breaks: true, maxNesting: 30 });
parser.disable(["code", "reference"]); // models indent texts; and without references a block is drawn on its own
addMath(parser);

/** Shows a text in `into`. Called again with a longer text, it draws only the blocks that have changed. */
export function showMarkdown(text, into) {
  if (text.length > LONGEST) {
    into.replaceChildren(make("div", { class: "plain" }, text));
    return;
  }
  const lines = text.split("\n");
  const blocks = splitBlocks(parser.parse(text, {}));
  blocks.forEach((tokens, i) => {
    const block = lines.slice(...tokens[0].map).join("\n");
    const source = `${tokens[0].type}\n${block}`;
    const old = into.children[i];
    if (old && sources.get(old) === source) return;
    const node = make("div", {}, EMPTY_ITEM.test(block) ? block.trim() : build(tokens));
    sources.set(node, source);
    if (old) old.replaceWith(node);
    else into.append(node);
  });
  while (into.children.length > blocks.length) into.lastChild.remove();
}

const sources = new WeakMap(); // a block's element -> its Markdown

function splitBlocks(tokens) {
  const blocks = [];
  let level = 0;
  for (const token of tokens) {
    if (level === 0) blocks.push([]);
    blocks.at(-1).push(token);
    level += token.nesting;
  }
  return blocks;
}

function build(tokens) {
  const root = document.createDocumentFragment();
  const open = [root];
  for (const token of tokens) {
    if (token.nesting < 0) open.pop();
    else if (token.type === "inline") open.at(-1).append(build(token.children));
    else {
      const node = token.hidden ? open.at(-1) : create(token);
      if (node !== open.at(-1)) open.at(-1).append(node);
      if (token.nesting > 0) open.push(node);
    }
  }
  return root;
}

function create(token) {
  if (LEAVES[token.type]) return LEAVES[token.type](token);
  if (token.type === "link_open") return link(token.attrGet("href"));
  if (!TAGS.has(token.tag)) return document.createTextNode(token.content);
  const node = make(token.tag, { start: token.attrGet("start") });
  const [, align] = /text-align:(\w+)/.exec(token.attrGet("style")) ?? [];
  if (align) node.style.textAlign = align;
  return node;
}

/** A link where it leads to another site or an address of e-mail, else the text alone. */
function link(to, ...children) {
  if (!/^(https?:|mailto:)/i.test(to)) return make("span", {}, ...children);
  return make("a", { href: to, rel: "noopener noreferrer nofollow", target: "_blank" }, ...children);
}
