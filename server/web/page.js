// What both pages share: the table of words, the switches of language and light, and how elements are made.

const WORDS = {
  // word: [Chinese, English]; {0} is filled in
  title_chat: ["芥子：对话", "Jiezi: chat"],
  title_runs: ["芥子：训练", "Jiezi: runs"],
  chat: ["对话", "Chat"],
  runs: ["训练", "Runs"],
  to_content: ["跳到内容", "Skip to content"],
  pages: ["页面", "Pages"],
  language: ["English", "中文"], // what the switch leads to
  language_label: ["Switch to English", "换成中文"],
  theme_auto: ["明暗：随系统", "Light: system"],
  theme_light: ["明暗：亮", "Light: light"],
  theme_dark: ["明暗：暗", "Light: dark"],
  key_title: ["服务器要密钥", "The server asks for a key"],
  key: ["密钥", "Key"],
  key_note: ["保存在这个标签页里，关掉就没了。", "Kept in this tab, and gone when it is closed."],
  ok: ["好", "OK"],
  cancel: ["取消", "Cancel"],
  unreachable: ["连不上服务器：它还开着吗？（python serve.py）", "No answer from the server: is it running? (python serve.py)"],

  history: ["历史", "History"],
  new_chat: ["新对话", "New chat"],
  delete_one: ["删除：{0}", "Delete: {0}"],
  delete_all: ["全部删除", "Delete all"],
  delete_all_sure: ["删除这个浏览器里的全部对话？", "Delete all chats in this browser?"],
  storage_full: ["浏览器存满了，这段对话没有存下来；删掉一些旧对话。", "The browser's storage is full and this chat is not kept; delete old ones."],
  conversation: ["对话内容", "Conversation"],
  hello: ["问点什么。", "Ask something."],
  hello_more: [
    "选“并排”，同一个问题同时问几个模型：每个阶段教会了它什么，一眼就看出来。",
    "With “side by side” several models get the same question: what each stage taught, in one view.",
  ],
  models: ["模型", "Models"],
  no_models: ["没有模型：先训练一个。", "No model: train one first."],
  compare: ["并排", "Side by side"],
  kind_chat: ["对话模型", "chat model"],
  kind_base: ["基座模型，续写文本", "base model, continues texts"],
  about_model: ["{0}：{1}，{2} 个参数，上下文 {3}，存于 {4}", "{0}: {1}, {2} parameters, context {3}, saved {4}"],
  message: ["消息", "Message"],
  placeholder: ["回车发送，Shift+回车换行，Esc 停止", "Enter sends, Shift+Enter: a new line, Esc stops"],
  send: ["发送", "Send"],
  stop: ["停止", "Stop"],
  settings: ["设置", "Settings"],
  system: ["系统提示词", "System prompt"],
  temperature: ["温度", "Temperature"],
  top_p: ["top_p", "top_p"],
  max_tokens: ["最多 token 数", "Tokens at most"],
  seed: ["随机种子", "Seed"],
  default: ["默认", "default"],
  you: ["你", "You"],
  edit: ["修改", "Edit"],
  regenerate: ["重新回答", "Regenerate"],
  thinking: ["思考", "Thinking"],
  tool: ["工具 {0}", "Tool {0}"],
  tokens: ["{0} token", "{0} tokens"],
  speed: ["{0} token/秒", "{0} tokens/s"],
  stopped: ["已停止", "stopped"],
  cut: ["到了长度上限", "cut at the limit"],
  forgot: ["放不下，没带上最早的 {0} 轮", "no room: without the {0} oldest turns"],
  broken_off: ["连接断了，回答不完整", "the connection broke off; the answer is not whole"],

  runs_found: ["训练记录", "Runs"],
  run: ["名称", "Run"],
  state: ["状态", "State"],
  running: ["进行中", "running"],
  finished: ["已结束", "ended"],
  updated: ["更新于", "Updated"],
  step: ["步", "Step"],
  loss: ["损失", "Loss"],
  no_runs: ["还没有训练记录：python 1-pretrain.py", "No runs yet: python 1-pretrain.py"],
  choose_runs: ["在上面勾选要看、要比的训练。", "Tick the runs to be watched or compared."],
  x_axis: ["横轴", "x axis"],
  x_step: ["步数", "steps"],
  x_tokens: ["token 数", "tokens"],
  x_minutes: ["分钟", "minutes"],
  log_y: ["纵轴取对数", "logarithmic y"],
  values: ["数值", "Values"],
  last: ["最后", "last"],
  lowest: ["最低", "lowest"],
  highest: ["最高", "highest"],
  by_source: ["{0}，按来源", "{0} by source"],
  series: ["曲线", "Curve"],
  chart_label: ["{0}的曲线图，左右方向键读数", "Chart of {0}; the arrow keys read values"],
  experts: ["各专家分到的 token（平均为 1）：{0}，第 {1} 步", "Tokens by expert (1: the mean): {0}, step {1}"],
  layer: ["层 {0}", "layer {0}"],
  samples: ["生成的样例：{0}", "Samples: {0}"],
  reward: ["奖励", "reward"],
  arguments: ["参数", "Arguments"],
  argument: ["参数", "Argument"],
  differs: ["不同", "differs"],
};

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
