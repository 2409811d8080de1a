// Chats as files: out as Markdown or JSON, in again from JSON.

import { path, read, title } from "./conversations.js";
import { make, word } from "./page.js";

const FORMAT = "jiezi-chats";

/** The turns that are shown, as a text. */
export function asMarkdown(chat) {
  const parts = [`# ${title(chat)}`];
  for (const { text, answers } of path(chat)) {
    parts.push(`## ${word("you")}`, text);
    for (const [model, { reasoning, given = "", content }] of Object.entries(answers)) {
      parts.push(`## ${model}`, ...(reasoning ? [reasoning.replace(/^/gm, "> ")] : []), given + content);
    }
  }
  return parts.join("\n\n") + "\n";
}

export function asJSON(chats) {
  return JSON.stringify({ format: FORMAT, chats }, null, 1);
}

/** The chats of a text that asJSON has made; none where it is another text. */
export function fromJSON(text) {
  try {
    const { format, chats } = JSON.parse(text);
    return format === FORMAT ? chats.map(read).filter(Boolean) : [];
  } catch {
    return [];
  }
}

export function download(name, type, text) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const file = name.replace(/[^\p{L}\p{N}_-]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60) || "chat";
  make("a", { href: address, download: `${file}.${type === "text/markdown" ? "md" : "json"}` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** Asks for a file and gives its text to `use`. */
export function pickFile(accept, use) {
  const input = make("input", { type: "file", accept });
  input.addEventListener("change", async () => input.files[0] && use(await input.files[0].text(), input.files[0].name));
  input.click();
}
