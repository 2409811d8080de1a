// Copying to the clipboard, also where the page is not served over HTTPS or from this machine.

import { make, word } from "./page.js";

/** A button that copies text(), and says for a moment whether it could. */
export function copyButton(text) {
  const button = make("button", { type: "button", class: "quiet", "data-word": "copy" });
  button.addEventListener("click", async () => {
    button.textContent = word((await copy(text())) ? "copied" : "copy_failed");
    setTimeout(() => (button.textContent = word("copy")), 1500);
  });
  return button;
}

/** Whether it could be copied. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copySelection(text); // navigator.clipboard exists in secure contexts only
  }
}

function copySelection(text) {
  const area = make("textarea", { class: "unseen" });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}
