// A line chart in SVG: curves of several runs over one axis, with values under the pointer or the arrow keys, and a table.

import { language, make, number, word } from "./page.js";

const [WIDTH, HEIGHT, RIGHT, TOP, BOTTOM] = [360, 220, 10, 26, 34]; // with margins, in units of the view box
const DIGIT = 7; // units, the width of a character in a label
const MOST = 400; // points of a curve that are drawn

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** At most about MOST of the points [x, y], among them the lowest and the highest of each stretch. */
export function thin(points) {
  if (points.length <= MOST) return points;
  const size = Math.ceil((2 * points.length) / MOST);
  const kept = [];
  for (let start = 0; start < points.length; start += size) {
    const some = points.slice(start, start + size);
    const low = some.reduce((a, b) => (b[1] < a[1] ? b : a));
    const high = some.reduce((a, b) => (b[1] > a[1] ? b : a));
    kept.push(...(low[0] < high[0] ? [low, high] : low === high ? [low] : [high, low]));
  }
  return [...kept, points.at(-1)];
}

/** Round numbers within [low, high]: about `count` of them, or on a logarithmic axis powers of ten and 2 and 5 times these. */
export function ticks(low, high, count, log = false) {
  if (log) {
    const powers = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) powers.push(10 ** power);
    const marks = powers.length > 4 ? powers : powers.flatMap((power) => [power, 2 * power, 5 * power]);
    const within = marks.filter((mark) => mark >= low && mark <= high);
    return within.length > 1 ? within : ticks(low, high, count);
  }
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/**
 * A <figure> that draw() fills, as often as there is something new.
 * draw({title, xName, yName, log, series: [{name, color, dash, bold, points: [[x, y]]}]}); color is a number, as in style.css.
 */
export function chart() {
  const [caption, legend, table] = [make("figcaption"), make("ul", { class: "legend" }), make("table")];
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: 0 });
  const values = make("details", {}, make("summary", { "data-word": "values" }), make("div", { class: "scroll" }, table));
  const figure = make("figure", {}, caption, picture, legend, values);
  let [series, log, xs, at] = [[], false, [], null]; // at: which of the sorted xs is read; null: the last of each curve
  let left = 0; // margin, for the labels of the y axis
  let [x, y] = [Number, Number]; // from a value to its place

  function draw(what) {
    ({ series, log } = what);
    series = series.filter((one) => one.points.length).map((one) => ({ ...one, drawn: one.points }));
    if (log) series = series.map((one) => ({ ...one, drawn: one.points.filter((point) => point[1] > 0) }));
    const points = series.flatMap((one) => one.drawn);
    caption.textContent = what.title;
    picture.setAttribute("aria-label", word("chart_label", what.title));
    xs = [...new Set(series.flatMap((one) => one.points.map((point) => point[0])))].sort((a, b) => a - b);
    if (at !== null && at >= xs.length) at = null;
    picture.replaceChildren();
    if (points.length) drawAxes(points, what);
    for (const one of series) picture.append(...curve(one));
    read(at);
    const rows = series.map(({ name, points }) => {
      const all = points.map((point) => point[1]);
      const [least, most] = range(all);
      const cells = [points.at(-1)[0], all.at(-1), least, most].map((value) => make("td", { class: "figure" }, number(value)));
      return make("tr", {}, make("th", { scope: "row" }, name), ...cells);
    });
    const head = [word("series"), what.xName, word("last"), word("lowest"), word("highest")];
    table.replaceChildren(make("tr", {}, ...head.map((text, i) => make("th", { scope: "col", class: i ? "figure" : "" }, text))), ...rows);
  }

  /** Sets the scales x and y, and draws both axes with their names. */
  function drawAxes(points, { xName, yName }) {
    const [from, to] = range(points.map((point) => point[0]));
    let [low, high] = range(points.map((point) => point[1]));
    if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
    const scale = log ? Math.log : Number;
    const [rows, columns] = [ticks(low, high, 5, log), from < to ? ticks(from, to, 5) : [from]];
    left = 8 + DIGIT * Math.max(...rows.map((mark) => label(mark).length));
    x = (value) => left + ((value - from) / (to - from || 1)) * (WIDTH - left - RIGHT);
    y = (value) => HEIGHT - BOTTOM - ((scale(value) - scale(low)) / (scale(high) - scale(low))) * (HEIGHT - BOTTOM - TOP);
    const text = (x, y, anchor, content) => picture.append(svg("text", { x, y, "text-anchor": anchor }, content));
    for (const mark of rows) {
      picture.append(svg("line", { class: "grid", x1: left, x2: WIDTH - RIGHT, y1: y(mark), y2: y(mark) }));
      text(left - 6, y(mark) + 4, "end", label(mark));
    }
    for (const mark of columns) {
      const half = (DIGIT * label(mark).length) / 2 + 3;
      text(Math.min(x(mark), WIDTH - half), HEIGHT - BOTTOM + 14, "middle", label(mark));
    }
    text((left + WIDTH - RIGHT) / 2, HEIGHT - 4, "middle", xName);
    text(2, 12, "start", yName);
  }

  function curve({ drawn, color, dash, bold }) {
    const points = thin(drawn);
    const line = svg("polyline", {
      class: `curve color${color} ${bold ? "bold" : ""}`,
      points: points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" "),
      "stroke-dasharray": dash ?? "none",
    });
    const dots = bold && points.length <= 40 ? points : points.length === 1 ? points : [];
    return [line, ...dots.map(([a, b]) => svg("circle", { class: `color${color}`, cx: x(a), cy: y(b), r: 2.8 }))];
  }

  /** Shows the values at xs[index]. */
  function read(index) {
    at = index;
    picture.querySelector(".cursor")?.remove();
    const place = at === null ? null : xs[at];
    if (place !== null) picture.append(svg("line", { class: "cursor", x1: x(place), x2: x(place), y1: TOP, y2: HEIGHT - BOTTOM }));
    const entries = series.map(({ name, points, color, dash, bold }) => {
      const point = place === null ? points.at(-1) : nearest(points, place);
      const swatch = svg("svg", { viewBox: "0 0 24 10", "aria-hidden": "true" });
      swatch.append(svg("line", { class: `curve color${color} ${bold ? "bold" : ""}`, x1: 0, x2: 24, y1: 5, y2: 5, "stroke-dasharray": dash ?? "none" }));
      return make("li", {}, swatch, `${name} `, make("b", {}, number(point[1])), place === null ? "" : ` @ ${number(point[0])}`);
    });
    legend.replaceChildren(...entries);
  }

  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const pointer = ((event.clientX - box.left) / box.width) * WIDTH;
    if (xs.length) read(xs.reduce((best, value, i) => (Math.abs(x(value) - pointer) < Math.abs(x(xs[best]) - pointer) ? i : best), 0));
  });
  picture.addEventListener("pointerleave", () => read(null));
  picture.addEventListener("blur", () => read(null));
  picture.addEventListener("focus", () => legend.setAttribute("aria-live", "polite"));
  picture.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: 10, PageDown: -10 }[event.key];
    if (!by || !xs.length) return;
    event.preventDefault();
    read(Math.min(xs.length - 1, Math.max(0, (at ?? xs.length - (by < 0 ? 0 : 1)) + by)));
  });
  return { figure, draw };
}

function range(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

/** The text at a mark of an axis. */
function label(value) {
  if (Math.abs(value) < 1e5) return number(value);
  return value.toLocaleString(language, { notation: "compact", maximumSignificantDigits: 3 });
}

function nearest(points, place) {
  return points.reduce((best, point) => (Math.abs(point[0] - place) < Math.abs(best[0] - place) ? point : best));
}
