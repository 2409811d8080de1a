// Keyboard shortcuts, and the sheet that lists them.

import { make, word } from "./page.js";

// By the key's place (event.code): with Alt, macOS types other characters.
const KEYS = { KeyN: "new_chat", KeyK: "search", KeyR: "regenerate", KeyC: "copy_answer", KeyT: "tokens_button", KeyE: "edit_last", KeyS: "settings", KeyU: "attach" };
const FIXED = { Enter: "send", "Shift+Enter": "new_line", Esc: "stop", "?": "shortcuts" };

/** actions: what each of the words in KEYS does. */
export function startShortcuts(actions) {
  document.addEventListener("keydown", (event) => {
    const isTyping = event.target.matches("input:not([type=checkbox], [type=radio]), textarea, select");
    const isPlain = !event.ctrlKey && !event.metaKey && !event.isComposing;
    const name = event.altKey && isPlain && !event.shiftKey ? KEYS[event.code] : null;
    if (name) {
      event.preventDefault();
      actions[name]();
    } else if (event.key === "?" && isPlain && !event.altKey && !isTyping) showSheet();
  });
}

export function showSheet() {
  if (document.querySelector("dialog[open]")) return;
  const alt = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌥" : "Alt+";
  const keys = [...Object.entries(FIXED), ...Object.entries(KEYS).map(([code, name]) => [alt + code.slice(-1), name])];
  const rows = keys.map(([key, name]) => make("tr", {}, make("td", {}, make("kbd", {}, key)), make("td", {}, word(name))));
  const close = make("button", { class: "main", "data-word": "ok" });
  const form = make("form", { method: "dialog" }, make("h2", { id: "sheet_title", "data-word": "shortcuts" }), make("table", {}, ...rows), close);
  const dialog = make("dialog", { "aria-labelledby": "sheet_title", close: () => dialog.remove() }, form);
  dialog.addEventListener("keydown", (event) => event.stopPropagation()); // Escape closes it and stops nothing
  document.body.append(dialog);
  dialog.showModal();
}
