// The server: requests with the key where it asks for one, and answers that come piece by piece.

import { make, word } from "./page.js";

/** The reply to a request. Error, with what the server says and its code, for one that is refused. */
export async function ask(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem("jiezi.key");
    const headers = { ...(options.body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
    let reply;
    try {
      reply = await fetch(path, { ...options, headers });
    } catch (error) {
      throw error.name === "AbortError" ? error : new Error(word("unreachable"));
    }
    if (reply.ok) return reply;
    const body = await reply.json().catch(() => ({}));
    const message = body.error?.message ?? body.detail ?? `${reply.status} ${reply.statusText}`;
    if (reply.status !== 401 || !(await askForKey(key))) throw Object.assign(new Error(String(message)), { code: body.error?.code });
  }
}

let asking = null; // of several requests that are refused at once, one asks

/** Whether there is now another key than the one that was refused. */
function askForKey(refused) {
  if (sessionStorage.getItem("jiezi.key") !== refused) return true;
  asking ??= new Promise((resolve) => {
    const input = make("input", { type: "password", name: "key", required: true, autocomplete: "off" });
    const dialog = make(
      "dialog",
      { "aria-labelledby": "key_title" },
      make(
        "form",
        { method: "dialog" },
        make("h2", { id: "key_title", "data-word": "key_title" }),
        make("label", {}, make("span", { "data-word": "key" }), input),
        make("p", { class: "note", "data-word": "key_note" }),
        make("button", { class: "main", value: "ok", "data-word": "ok" }),
        make("button", { value: "cancel", formnovalidate: true, "data-word": "cancel" }),
      ),
    );
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "ok";
      if (given) sessionStorage.setItem("jiezi.key", input.value);
      dialog.remove();
      asking = null;
      resolve(given);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
  return asking;
}

/** The objects of a stream of server-sent events. Error where the server reports one, or it ends without [DONE]. */
export async function* stream(path, body, signal) {
  const reply = await ask(path, { method: "POST", body: JSON.stringify(body), signal });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw signal.aborted ? error : new Error(word("broken_off"));
    });
    if (done) throw new Error(word("broken_off"));
    const lines = (text + value).split(/\r?\n/);
    text = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
