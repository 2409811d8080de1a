// Text files for the prompt: dropped on the page, or chosen.

import { make, word } from "./page.js";

const LARGEST = 200_000; // bytes

/** insert(text) receives what is to stand in the prompt, say(message) why a file is refused. */
export function startAttach(target, button, insert, say) {
  async function take(file) {
    const text = await readText(file);
    if (text === null) say(word("not_text", file.name, LARGEST / 1000));
    else insert(`${file.name}:\n${fenced(text)}\n`);
  }
  target.addEventListener("dragover", (event) => {
    if (event.dataTransfer.types.includes("Files")) event.preventDefault();
  });
  target.addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    [...event.dataTransfer.files].forEach(take);
  });
  button.addEventListener("click", () => {
    const input = make("input", { type: "file", multiple: true });
    input.addEventListener("change", () => [...input.files].forEach(take));
    input.click();
  });
}

/** The text of a file; null where it is too large, or no text in UTF-8. */
async function readText(file) {
  if (file.size > LARGEST) return null;
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    return text.includes("\0") ? null : text;
  } catch {
    return null;
  }
}

/** In a fence that is longer than every row of backticks in it. */
function fenced(text) {
  const longest = Math.max(2, ...(text.match(/`+/g) ?? []).map((row) => row.length));
  const fence = "`".repeat(longest + 1);
  return `${fence}\n${text.replace(/\n$/, "")}\n${fence}`;
}
