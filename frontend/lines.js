// The chosen head as lines: queries on the left, keys on the right, a curve for every weight, numbers beside the tokens.

import { create } from "d3-selection";
import { linkHorizontal } from "d3-shape";
import { BARRED, KNOWN, UNKNOWN, cell, reach } from "./decode.js";
import { height } from "./colour.js";
import { atMost, byId, chosenHead, chosenLayer, keyTokens, make, on, pin, point, queryTokens, rawOf, reveal, state, three } from "./state.js";
import { receivedScale } from "./reading.js";

export const ROW = 26; // the height of a token's row in pixels, the same in page.css
const LEVELS = 16; // curves of like weight share one path, so that a page draws sixteen shapes and not ten thousand
const CURVES = 2400; // as many as are drawn at rest; the rest appear when a token is chosen
const AHEAD = 24; // rows that are held ready beyond those in sight
const SHORT = 400; // a text of fewer tokens has all its rows at once

export const linesView = { shape: "", asks: null, answers: null, from: 0, to: 0, cutoff: 0 };

function drawing(name, strength) {
  const svg = create("svg").attr("class", name).attr("preserveAspectRatio", "none").attr("aria-hidden", "true");
  const paths = Array.from({ length: LEVELS }, (_, level) => {
    const t = (level + 0.5) / LEVELS;
    return svg.append("path").attr("stroke-opacity", (0.05 + 0.93 * t ** strength).toFixed(3)).attr("stroke-width", (0.7 + 4.3 * t ** 1.6).toFixed(2)).node();
  });
  return { svg: svg.node(), paths };
}

export const rest = drawing("curves resting", 1.3);
export const hot = drawing("curves hot", 0.7);

// A curve that leaves sight leads a little beyond it: one that is a million pixels long takes as long to draw.
const inSight = (n) => Math.max(linesView.from - 2 * AHEAD, Math.min(linesView.to + 2 * AHEAD, n));

const curve = linkHorizontal().source(([query]) => [0, query]).target(([, key]) => [100, key]).y(([, n]) => (inSight(n) + 0.5) * ROW);

// curves: an iterable of [query, key, weight]
function draw({ paths }, curves) {
  const shapes = Array.from({ length: LEVELS }, () => []);
  for (const drawn of curves) shapes[Math.min(LEVELS - 1, Math.floor(height(drawn[2]) * LEVELS))].push(curve(drawn));
  paths.forEach((path, level) => path.setAttribute("d", shapes[level].join("")));
}

// A column of tokens, of which the rows in sight exist: `rows` holds them by the number of their token.
function column(kind, tokens, offset) {
  const list = make("ol", { class: `column ${kind}`, role: "listbox", tabindex: "-1", "aria-label": kind === "ask" ? "Queries: where a token looks" : "Keys: who looks at a token" });
  list.style.height = `${tokens.length * ROW}px`;
  const made = { kind, tokens, offset, list, rows: new Map(), stop: 0 };
  const target = (n) => (kind === "ask" ? [n, null] : [null, n]);
  const at = (event) => {
    const item = event.target.closest("li");
    return item ? Number(item.dataset.token) : null;
  };
  list.addEventListener("pointerover", (event) => {
    if (event.pointerType === "mouse" && at(event) !== null) point(...target(at(event)));
  });
  list.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(null, null));
  list.addEventListener("click", (event) => at(event) !== null && pin(...target(at(event))));
  list.addEventListener("focusin", (event) => at(event) !== null && event.target.matches(":focus-visible") && point(...target(at(event))));
  list.addEventListener("focusout", () => point(null, null));
  list.addEventListener("keydown", (event) => {
    const n = at(event);
    if (n === null) return;
    const other = kind === "ask" ? linesView.answers : linesView.asks;
    const step = { ArrowDown: n + 1, ArrowUp: n - 1, Home: 0, End: tokens.length - 1, PageDown: n + 10, PageUp: n - 10 }[event.key];
    if (step !== undefined) walk(made, step);
    else if (event.key === (kind === "ask" ? "ArrowRight" : "ArrowLeft")) walk(other, n);
    else if (event.key === "Enter" || event.key === " ") pin(...target(n));
    else return;
    event.preventDefault();
  });
  return made;
}

function row(of, n) {
  const token = of.tokens[n];
  const text = make("span", { class: `token${token[1] ? " continues" : ""}${token[2] ? " marker" : ""}` }, token[0]);
  const figure = make("span", { class: "figure" });
  const item = make("li", { role: "option", tabindex: n === of.stop ? "0" : "-1", "aria-setsize": of.tokens.length, "aria-posinset": n + 1, title: `${rawOf(token)}  (token ${n + of.offset})` }, ...(of.kind === "ask" ? [figure, text] : [text, figure]));
  item.dataset.token = n;
  return { item, text, figure };
}

// Have the rows from .. to of a column, and no others.
function fill(of, from, to) {
  const end = Math.min(to, of.tokens.length);
  const kept = document.activeElement;
  for (const [n, { item }] of of.rows) {
    if ((n < from || n >= end) && item !== kept) {
      item.remove();
      of.rows.delete(n);
    }
  }
  for (let n = from; n < end; n++) {
    if (of.rows.has(n)) continue;
    const made = row(of, n);
    made.item.style.top = `${n * ROW}px`;
    of.rows.set(n, made);
    of.list.append(made.item);
  }
  const first = Math.min(Math.max(of.stop, from), end - 1); // a row in sight is reached by Tab
  of.rows.forEach(({ item }, n) => (item.tabIndex = n === first ? 0 : -1));
}

function walk(of, n) {
  const to = Math.max(0, Math.min(of.tokens.length - 1, n));
  of.stop = to;
  if (!of.rows.has(to)) {
    linesView.scroll.scrollTop = Math.max(0, to * ROW - linesView.scroll.clientHeight / 2);
    lookAround();
  }
  of.rows.forEach(({ item }, m) => (item.tabIndex = m === to ? 0 : -1));
  of.rows.get(to).item.focus();
}

// The rows in sight have changed: make those that are missing, and draw what belongs to them.
function lookAround(always = false) {
  const { scroll, asks, answers } = linesView;
  const most = Math.max(asks.tokens.length, answers.tokens.length);
  let from = 0;
  let to = most;
  if (most > SHORT) {
    const first = Math.floor(scroll.scrollTop / ROW);
    const last = first + Math.ceil(scroll.clientHeight / ROW);
    if (!always && first >= linesView.from && last <= linesView.to) return;
    from = Math.max(0, first - AHEAD);
    to = Math.min(most, last + AHEAD);
  }
  Object.assign(linesView, { from, to });
  fill(asks, from, to);
  fill(answers, from, to);
  for (const { svg } of [rest, hot]) {
    svg.setAttribute("viewBox", `0 ${from * ROW} 100 ${(to - from) * ROW}`);
    svg.style.top = `${from * ROW}px`;
    svg.style.height = `${(to - from) * ROW}px`;
  }
  drawCurves();
  drawFocus();
}

function buildLines() {
  const layer = chosenLayer();
  const shape = [layer.queryText, layer.keyText, layer.queries, layer.keys, layer.offset].join();
  if (linesView.shape === shape) return;
  linesView.shape = shape;
  const asks = column("ask", queryTokens(layer), layer.offset);
  const answers = column("answer", keyTokens(layer), 0);
  const names = make("div", { class: "names", "aria-hidden": "true" });
  names.append(
    make("div", {}, make("span", { class: "what", id: "ask-what" }), make("b", { class: "ask" }, "Query")),
    make("span"),
    make("div", {}, make("b", { class: "answer" }, "Key"), make("span", { class: "what", id: "answer-what" })),
  );
  const field = make("div", { class: "field" }, rest.svg, hot.svg);
  const scroll = make("div", { class: "scroll" }, names, make("div", { class: "body" }, asks.list, field, answers.list));
  let pending = 0;
  scroll.addEventListener("scroll", () => {
    cancelAnimationFrame(pending);
    pending = requestAnimationFrame(() => lookAround());
  });
  Object.assign(linesView, { asks, answers, scroll });
  byId("lines").replaceChildren(scroll, make("p", { class: "note soft", id: "lines-note" }));
}

function drawLines() {
  byId("panels").classList.toggle("coarse", Boolean(chosenHead().cells));
  if (chosenHead().cells) return;
  buildLines();
  lookAround(true);
}

// The strongest curves of the queries in sight.
function drawCurves() {
  const layer = chosenLayer();
  const head = chosenHead();
  const tokens = keyTokens(layer);
  const first = Math.min(linesView.from, layer.queries);
  const last = Math.min(linesView.to, layer.queries);
  const found = [];
  for (let i = first; i < last; i++) {
    for (let n = head.start[i]; n < head.start[i + 1]; n++) {
      if (state.markers || !tokens[head.key[n]][2]) found.push([i, head.key[n], head.weight[n]]);
    }
  }
  const sorted = Float32Array.from(found, (curve_) => curve_[2]).sort();
  linesView.cutoff = Math.max(0.003, sorted.length > CURVES ? sorted[sorted.length - CURVES] : 0);
  const strong = found.filter((curve_) => curve_[2] >= linesView.cutoff).slice(0, CURVES);
  draw(rest, strong);
  byId("lines-note").textContent = strong.length < found.length && linesView.cutoff > 0.003 ? `Weights under ${three(linesView.cutoff)} get their line when a token is chosen.` : "";
}

// What already stands there is left alone: a long text then costs no more than what changes in it.
function setFigure(place, text, part, kind) {
  const { item, figure } = place;
  const now = `${text} ${part.toFixed(3)} ${kind}`;
  if (place.now === now) return;
  place.now = now;
  figure.textContent = text;
  item.style.setProperty("--part", part.toFixed(3));
  item.classList.toggle("unknown", kind === UNKNOWN);
  item.classList.toggle("barred", kind === BARRED);
}

// The number of one weight: to three decimals, or the most it can be, or a dash.
function weightFigure(part, found) {
  const text = { [KNOWN]: three(found.weight), [UNKNOWN]: atMost(found.weight), [BARRED]: "–" }[found.kind];
  setFigure(part, text, found.kind === KNOWN ? height(found.weight) : 0, found.kind);
}

function spreadFigures(layer, head) {
  linesView.asks.rows.forEach((part, i) => {
    if (!head.entropy) return setFigure(part, "", 0, KNOWN);
    const most = Math.log(Math.max(1, reach(layer, head, i)));
    return setFigure(part, head.entropy[i].toFixed(2), most ? Math.min(1, head.entropy[i] / most) : 0, KNOWN);
  });
  byId("ask-what").textContent = head.entropy ? "entropy" : "";
}

function receivedFigures(layer, head) {
  const scale = receivedScale(layer, head);
  linesView.answers.rows.forEach((part, j) => setFigure(part, `${layer.receivedExact ? "" : "≥"}${head.received[j].toFixed(2)}`, scale(j), KNOWN));
  byId("answer-what").textContent = "received";
}

function drawFocus() {
  const layer = chosenLayer();
  const head = chosenHead();
  if (head.cells || !linesView.scroll) return;
  const { query, key } = state.focus || { query: null, key: null };
  const curves = [];
  if (query !== null) {
    for (let n = head.start[query]; n < head.start[query + 1]; n++) {
      if (key === null || head.key[n] === key) curves.push([query, head.key[n], head.weight[n]]);
    }
    linesView.answers.rows.forEach((part, j) => weightFigure(part, cell(layer, head, query, j)));
    byId("answer-what").textContent = "weight";
    spreadFigures(layer, head);
  } else if (key !== null) {
    linesView.asks.rows.forEach((part, i) => weightFigure(part, cell(layer, head, i, key)));
    for (let i = 0; i < layer.queries; i++) {
      const found = cell(layer, head, i, key);
      if (found.kind === KNOWN) curves.push([i, key, found.weight]);
    }
    byId("ask-what").textContent = "weight";
    receivedFigures(layer, head);
  } else {
    spreadFigures(layer, head);
    receivedFigures(layer, head);
  }
  draw(hot, curves);
  byId("lines").classList.toggle("focused", query !== null || key !== null);
  linesView.asks.rows.forEach(({ item }, i) => {
    item.classList.toggle("chosen", i === query);
    item.setAttribute("aria-selected", i === query);
  });
  linesView.answers.rows.forEach(({ item }, j) => {
    item.classList.toggle("chosen", j === key);
    item.setAttribute("aria-selected", j === key);
  });
}

// What was pinned elsewhere comes into sight here.
function showPinned() {
  if (!state.pin || !linesView.scroll || chosenHead().cells) return;
  const n = state.pin.query ?? state.pin.key;
  reveal(linesView.scroll, n * ROW, (n + 3) * ROW);
  lookAround();
}

on("head markers view beside", drawLines);
on("pin", showPinned);
on("focus", drawFocus);
