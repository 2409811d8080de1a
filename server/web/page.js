// What both pages share: the switches of language and light, what the browser stores, and how elements are made.

import { WORDS } from "./words.js";

const THEMES = ["auto", "light", "dark"];

/** What is kept in this browser under a name. A browser that keeps nothing gives `fallback`. */
export function kept(name, fallback = null) {
  try {
    return JSON.parse(localStorage.getItem(`jiezi.${name}`)) ?? fallback;
  } catch {
    return fallback;
  }
}

/** Whether it could be kept. */
export function keep(name, value) {
  try {
    localStorage.setItem(`jiezi.${name}`, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export let language = kept("language", navigator.language.startsWith("zh") ? "zh" : "en");

/** For dates: the reader's own form of the language, say British, where it is that of the page. */
export function locale() {
  return navigator.language.startsWith(language) ? navigator.language : language;
}

export function word(name, ...values) {
  const text = WORDS[name][language === "zh" ? 0 : 1];
  return values.reduce((filled, value, i) => filled.replace(`{${i}}`, () => value), text);
}

export function number(value, digits = 4) {
  if (typeof value !== "number") return "";
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(2);
  return value.toLocaleString(locale(), Number.isInteger(value) ? {} : { maximumSignificantDigits: digits });
}

/** An element. Functions listen, null and false are left out, strings among the children become text. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value != null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child != null));
  translate(element);
  return element;
}

/** Puts the words of data-word, data-label and data-placeholder into an element and those in it. */
function translate(root) {
  for (const element of [root, ...root.querySelectorAll("[data-word], [data-label], [data-placeholder]")]) {
    const { word: text, label, placeholder } = element.dataset;
    if (text) element.textContent = word(text);
    if (label) element.setAttribute("aria-label", word(label));
    if (label && element.matches("button")) element.title = word(label);
    if (placeholder) element.setAttribute("placeholder", word(placeholder));
  }
}

/** Sets a page up in the reader's language and light; `redraw` is called when the language changes. */
export function startPage(title, redraw) {
  let theme = kept("theme", "auto");
  const [languageSwitch, themeSwitch] = ["language", "theme"].map((id) => document.getElementById(id));
  function show() {
    document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
    document.documentElement.dataset.theme = theme;
    document.title = word(title);
    themeSwitch.textContent = { auto: "◐", light: "☀", dark: "☾" }[theme];
    themeSwitch.dataset.label = `theme_${theme}`;
    translate(document.body);
  }
  languageSwitch.addEventListener("click", () => {
    language = language === "zh" ? "en" : "zh";
    keep("language", language);
    show();
    redraw();
  });
  themeSwitch.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    keep("theme", theme);
    show();
  });
  show();
}
