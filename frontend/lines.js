// The chosen head as lines: queries on the left, keys on the right, one curve per weight, and numbers beside the tokens.

import { create } from "d3-selection";
import { linkHorizontal } from "d3-shape";
import { MASKED, KNOWN, UNKNOWN, cell, reach } from "./decode.js";
import { rampPosition } from "./color.js";
import { byId, make, reveal } from "./dom.js";
import { fixed3, upperBound } from "./format.js";
import { chosenHead, chosenLayer, currentFocus, keyTokens, on, pin, point, queryTokens, rawOf, state } from "./state.js";
import { receivedScale } from "./reading.js";

export const ROW = 26; // the height of a row in pixels, as in page.css
const LEVELS = 16; // curves of similar weight share one SVG path: 16 paths instead of 10,000
const CURVES = 2400; // at most this many curves without a focus; the others are drawn when their token is focused
const MARGIN = 24; // rows beyond the visible ones that exist too
const SHORT = 400; // a text of at most this many tokens has all its rows at once

export const linesView = { shape: "", queryColumn: null, keyColumn: null, from: 0, to: 0, cutoff: 0 };

function makeCurves(name, strength) {
  const svg = create("svg").attr("class", name).attr("preserveAspectRatio", "none").attr("aria-hidden", "true");
  const paths = Array.from({ length: LEVELS }, (_, level) => {
    const t = (level + 0.5) / LEVELS;
    return svg.append("path").attr("stroke-opacity", (0.05 + 0.93 * t ** strength).toFixed(3)).attr("stroke-width", (0.7 + 4.3 * t ** 1.6).toFixed(2)).node();
  });
  return { svg: svg.node(), paths };
}

export const restingCurves = makeCurves("curves resting", 1.3);
export const focusedCurves = makeCurves("curves focus", 0.7);

// Clamp a row to just beyond the visible ones, since drawing a curve takes time in proportion to its length.
const clampToView = (n) => Math.max(linesView.from - 2 * MARGIN, Math.min(linesView.to + 2 * MARGIN, n));

const curve = linkHorizontal().source(([query]) => [0, query]).target(([, key]) => [100, key]).y(([, n]) => (clampToView(n) + 0.5) * ROW);

// Draw curves, an iterable of [query, key, weight].
function drawPaths({ paths }, curves) {
  const shapes = Array.from({ length: LEVELS }, () => []);
  for (const link of curves) shapes[Math.min(LEVELS - 1, Math.floor(rampPosition(link[2]) * LEVELS))].push(curve(link));
  paths.forEach((path, level) => path.setAttribute("d", shapes[level].join("")));
}

// A column of tokens. Only the visible rows exist; `rows` maps the index of a token to its row.
function makeColumn(kind, tokens, offset) {
  const list = make("ol", { class: `column ${kind}`, role: "listbox", tabindex: "-1", "aria-label": kind === "query" ? "Queries: what a token attends to" : "Keys: what attends to a token" });
  list.style.height = `${tokens.length * ROW}px`;
  const made = { kind, tokens, offset, list, rows: new Map(), tabStop: 0 };
  const target = (n) => (kind === "query" ? [n, null] : [null, n]);
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
    const other = kind === "query" ? linesView.keyColumn : linesView.queryColumn;
    const step = { ArrowDown: n + 1, ArrowUp: n - 1, Home: 0, End: tokens.length - 1, PageDown: n + 10, PageUp: n - 10 }[event.key];
    if (step !== undefined) focusRow(made, step);
    else if (event.key === (kind === "query" ? "ArrowRight" : "ArrowLeft")) focusRow(other, n);
    else if (event.key === "Enter" || event.key === " ") pin(...target(n));
    else return;
    event.preventDefault();
  });
  return made;
}

function makeRow(column, n) {
  const token = column.tokens[n];
  const text = make("span", { class: `token${token[1] ? " continues" : ""}${token[2] ? " marker" : ""}`, dir: "auto" }, token[0]);
  const figure = make("span", { class: "figure" });
  const item = make("li", { role: "option", tabindex: n === column.tabStop ? "0" : "-1", "aria-setsize": column.tokens.length, "aria-posinset": n + 1, title: `${rawOf(token)}  (token ${n + column.offset})` }, ...(column.kind === "query" ? [figure, text] : [text, figure]));
  item.dataset.token = n;
  return { item, text, figure };
}

// Create the rows from..to of a column, and remove all others but the focused one.
function fillRows(column, from, to) {
  const end = Math.min(to, column.tokens.length);
  const focused = document.activeElement;
  for (const [n, { item }] of column.rows) {
    if ((n < from || n >= end) && item !== focused) {
      item.remove();
      column.rows.delete(n);
    }
  }
  for (let n = from; n < end; n++) {
    if (column.rows.has(n)) continue;
    const made = makeRow(column, n);
    made.item.style.top = `${n * ROW}px`;
    column.rows.set(n, made);
    column.list.append(made.item);
  }
  const first = Math.min(Math.max(column.tabStop, from), end - 1); // Tab reaches a visible row
  column.rows.forEach(({ item }, n) => (item.tabIndex = n === first ? 0 : -1));
}

function focusRow(column, n) {
  const to = Math.max(0, Math.min(column.tokens.length - 1, n));
  column.tabStop = to;
  if (!column.rows.has(to)) {
    linesView.scroll.scrollTop = Math.max(0, to * ROW - linesView.scroll.clientHeight / 2);
    updateRows();
  }
  column.rows.forEach(({ item }, m) => (item.tabIndex = m === to ? 0 : -1));
  column.rows.get(to).item.focus();
}

// Create the rows that have become visible, and draw their curves.
function updateRows(always = false) {
  const { scroll, queryColumn, keyColumn } = linesView;
  const most = Math.max(queryColumn.tokens.length, keyColumn.tokens.length);
  let from = 0;
  let to = most;
  if (most > SHORT) {
    const first = Math.floor(scroll.scrollTop / ROW);
    const last = first + Math.ceil(scroll.clientHeight / ROW);
    if (!always && first >= linesView.from && last <= linesView.to) return;
    from = Math.max(0, first - MARGIN);
    to = Math.min(most, last + MARGIN);
  }
  Object.assign(linesView, { from, to });
  fillRows(queryColumn, from, to);
  fillRows(keyColumn, from, to);
  for (const { svg } of [restingCurves, focusedCurves]) {
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
  const queryColumn = makeColumn("query", queryTokens(layer), layer.offset);
  const keyColumn = makeColumn("key", keyTokens(layer), 0);
  const names = make("div", { class: "names", "aria-hidden": "true" });
  names.append(
    make("div", {}, make("span", { class: "what", id: "query-what" }), make("b", { class: "query" }, "Query →")),
    make("span"),
    make("div", {}, make("b", { class: "key" }, "→ Key"), make("span", { class: "what", id: "key-what" })),
  );
  const field = make("div", { class: "field" }, restingCurves.svg, focusedCurves.svg);
  const scroll = make("div", { class: "scroll" }, names, make("div", { class: "body" }, queryColumn.list, field, keyColumn.list));
  let pending = 0;
  scroll.addEventListener("scroll", () => {
    cancelAnimationFrame(pending);
    pending = requestAnimationFrame(() => updateRows());
  });
  Object.assign(linesView, { queryColumn, keyColumn, scroll });
  byId("lines").replaceChildren(scroll, make("p", { class: "note soft", id: "lines-note" }));
}

function drawLines() {
  byId("panels").classList.toggle("coarse", Boolean(chosenHead().cells));
  if (chosenHead().cells) return;
  buildLines();
  updateRows(true);
}

// Draw the curves of the largest weights of the visible queries.
function drawCurves() {
  const layer = chosenLayer();
  const head = chosenHead();
  const tokens = keyTokens(layer);
  const first = Math.min(linesView.from, layer.queries);
  const last = Math.min(linesView.to, layer.queries);
  const links = [];
  for (let i = first; i < last; i++) {
    for (let n = head.start[i]; n < head.start[i + 1]; n++) {
      if (state.markers || !tokens[head.key[n]][2]) links.push([i, head.key[n], head.weight[n]]);
    }
  }
  const sorted = Float32Array.from(links, (link) => link[2]).sort();
  linesView.cutoff = Math.max(0.003, sorted.length > CURVES ? sorted[sorted.length - CURVES] : 0);
  const strong = links.filter((link) => link[2] >= linesView.cutoff).slice(0, CURVES);
  drawPaths(restingCurves, strong);
  byId("lines-note").textContent = strong.length < links.length && linesView.cutoff > 0.003 ? `Weights below ${fixed3(linesView.cutoff)} are drawn when a token is selected.` : "";
}

// Set the number beside a token, if it differs: the cost of an update is then that of its changes.
function setFigure(row, text, part, kind) {
  const { item, figure } = row;
  const now = `${text} ${part.toFixed(3)} ${kind}`;
  if (row.now === now) return;
  row.now = now;
  figure.textContent = text;
  item.style.setProperty("--part", part.toFixed(3));
  item.classList.toggle("unknown", kind === UNKNOWN);
  item.classList.toggle("masked", kind === MASKED);
}

// Show one weight: three decimals, an upper bound, or a dash.
function drawWeight(row, entry) {
  const text = { [KNOWN]: fixed3(entry.weight), [UNKNOWN]: upperBound(entry.weight), [MASKED]: "–" }[entry.kind];
  setFigure(row, text, entry.kind === KNOWN ? rampPosition(entry.weight) : 0, entry.kind);
}

function drawEntropy(layer, head) {
  linesView.queryColumn.rows.forEach((row, i) => {
    if (!head.entropy) return setFigure(row, "", 0, KNOWN);
    const most = Math.log(Math.max(1, reach(layer, head, i)));
    return setFigure(row, head.entropy[i].toFixed(2), most ? Math.min(1, head.entropy[i] / most) : 0, KNOWN);
  });
  nameFigures("query-what", head.entropy ? "entropy" : "", "Entropy of the weights of this query, in nats: 0 if it attends to a single token");
}

// The name of the numbers in a column, and their explanation.
function nameFigures(id, name, hint) {
  byId(id).textContent = name;
  byId(id).title = hint;
}

const WEIGHT = "The attention weight, from 0 to 1";

function drawReceived(layer, head) {
  const scale = receivedScale(layer, head);
  linesView.keyColumn.rows.forEach((row, j) => setFigure(row, `${layer.receivedExact ? "" : "≥"}${head.received[j].toFixed(2)}`, scale(j), KNOWN));
  nameFigures("key-what", "received", "Sum of the weights that all queries give to this key");
}

function drawFocus() {
  const layer = chosenLayer();
  const head = chosenHead();
  if (head.cells || !linesView.scroll) return;
  const { query, key } = currentFocus();
  const curves = [];
  if (query !== null) {
    for (let n = head.start[query]; n < head.start[query + 1]; n++) {
      if (key === null || head.key[n] === key) curves.push([query, head.key[n], head.weight[n]]);
    }
    linesView.keyColumn.rows.forEach((row, j) => drawWeight(row, cell(layer, head, query, j)));
    nameFigures("key-what", "weight", WEIGHT);
    drawEntropy(layer, head);
  } else if (key !== null) {
    linesView.queryColumn.rows.forEach((row, i) => drawWeight(row, cell(layer, head, i, key)));
    for (let i = 0; i < layer.queries; i++) {
      const entry = cell(layer, head, i, key);
      if (entry.kind === KNOWN) curves.push([i, key, entry.weight]);
    }
    nameFigures("query-what", "weight", WEIGHT);
    drawReceived(layer, head);
  } else {
    drawEntropy(layer, head);
    drawReceived(layer, head);
  }
  drawPaths(focusedCurves, curves);
  byId("lines").classList.toggle("focused", query !== null || key !== null);
  linesView.queryColumn.rows.forEach(({ item }, i) => {
    item.classList.toggle("chosen", i === query);
    item.setAttribute("aria-selected", i === query);
  });
  linesView.keyColumn.rows.forEach(({ item }, j) => {
    item.classList.toggle("chosen", j === key);
    item.setAttribute("aria-selected", j === key);
  });
}

// Scroll to a token that was pinned elsewhere.
function showPinned() {
  if (!state.pin || !linesView.scroll || chosenHead().cells) return;
  const n = state.pin.query ?? state.pin.key;
  reveal(linesView.scroll, n * ROW, (n + 3) * ROW);
  updateRows();
}

on("head markers view beside", drawLines);
on("pin", showPinned);
on("focus", drawFocus);
