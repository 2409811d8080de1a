// The list of chats: search, rename, export, import, delete.

import { conversations, forget, matches, store, title } from "./conversations.js";
import { make, word } from "./page.js";
import { asJSON, asMarkdown, download, fromJSON, pickFile } from "./transfer.js";

const $ = (id) => document.getElementById(id);

/** Fills the list and keeps it. current(): the id of the open chat. open(chat): shows one; without a chat, a new one. */
export function startHistory({ current, open, renamed, say }) {
  function draw() {
    const words = $("search").value.trim();
    const all = conversations();
    const shown = words ? all.filter((chat) => matches(chat, words)) : all;
    $("conversations").replaceChildren(...shown.map(entry));
    $("none_found").hidden = shown.length > 0 || !words;
    $("delete_all").disabled = $("export_all").disabled = !all.length;
  }

  function entry(chat) {
    const name = title(chat);
    const button = (key, click) => make("button", { type: "button", class: "quiet", "data-word": key, click });
    const tools = make(
      "details",
      {},
      make("summary", { "aria-label": word("more", name), title: word("more", name) }, "⋯"),
      button("rename", () => rename(chat, item)),
      button("export_markdown", () => download(name, "text/markdown", asMarkdown(chat))),
      button("export_json", () => download(name, "application/json", asJSON([chat]))),
      button("delete", () => remove(chat)),
    );
    const isOpen = chat.id === current();
    const item = make("li", {}, make("button", { type: "button", "aria-current": isOpen && "true", click: () => open(chat) }, name), tools);
    return item;
  }

  function rename(chat, item) {
    const input = make("input", { "data-label": "name", maxlength: 200 });
    input.value = title(chat);
    const form = make("form", {}, input, make("button", { class: "main", "data-word": "ok" }));
    form.addEventListener("keydown", (event) => event.key === "Escape" && (event.stopPropagation(), draw()));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      chat.name = input.value.trim();
      store(chat);
      renamed(chat);
      draw();
    });
    item.replaceChildren(form);
    input.select();
  }

  function remove(chat) {
    forget(chat);
    if (chat.id === current()) open();
    else draw();
  }

  function take(text) {
    const chats = fromJSON(text);
    say(chats.length ? word("imported", chats.length) : word("not_chats"));
    if (!chats.every(store)) say(word("storage_full"));
    if (chats.some((chat) => chat.id === current())) open(chats.find((chat) => chat.id === current()));
    else draw();
  }

  $("search").addEventListener("input", draw);
  $("export_all").addEventListener("click", () => download("jiezi-chats", "application/json", asJSON(conversations())));
  $("import").addEventListener("click", () => pickFile("application/json,.json", take));
  $("delete_all").addEventListener("click", () => {
    if (!confirm(word("delete_all_sure"))) return;
    conversations().forEach(forget);
    open();
  });
  return draw;
}
