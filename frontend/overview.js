// Every head at a glance: a row a layer, a column a head, and in each thumbnail its pattern, what its keys receive or how wide its
// queries look.

import { max } from "d3-array";
import { allowed, data, headOf, reach } from "./decode.js";
import { cssColour, height, pixel, ramp, shade, theme } from "./colour.js";
import { byId, chooseHead, chosenLayer, make, on, reveal, segments, state, tell } from "./state.js";

const dense = data.layers.some((layer) => layer.heads.length > 16);
const THUMB = dense ? 32 : 96; // pixels a side, about
export const CELLS = 32; // of a head that the page holds in overview alone, as in data.py
const POOL = dense ? 32 : 40; // cells a side; a longer text is pooled by its greatest weight, so a thin line stays a line
const UNRECORDED = { light: [[214, 217, 224], [240, 241, 244]], dark: [[44, 50, 62], [30, 35, 44]] }; // its hatching, and what is between

function drawPattern(canvas, layer, head) {
  const side = head.cells ? CELLS : POOL;
  const wide = Math.min(side, layer.keys);
  const high = Math.min(side, layer.queries);
  const across = Math.ceil(THUMB / wide); // whole pixels a cell, else some cells come out wider than others
  const down = Math.ceil(THUMB / high);
  const image = new ImageData(wide * across, high * down);
  const pixels = new Uint32Array(image.data.buffer);
  const most = new Float32Array(wide * high).fill(-1); // -1: nothing known here
  const open = new Uint8Array(wide * high); // some key here may be attended
  if (head.cells) {
    head.cells.forEach((byte, place) => {
      if (byte) most[place] = ((byte - 1) / 254) ** 2;
    });
    for (let y = 0; y < high; y++) open.fill(1, y * wide, y * wide + Math.ceil((allowed(layer, Math.ceil(((y + 1) * layer.queries) / high) - 1) * wide) / layer.keys));
  }
  for (let i = 0; i < layer.queries && !head.cells; i++) {
    const y = Math.floor((i * high) / layer.queries);
    for (let n = head.start[i]; n < head.start[i + 1]; n++) {
      const place = y * wide + Math.floor((head.key[n] * wide) / layer.keys);
      if (head.weight[n] > most[place]) most[place] = head.weight[n];
    }
    if (!head.complete[i]) open.fill(1, y * wide, y * wide + Math.ceil((allowed(layer, i) * wide) / layer.keys));
  }
  const shades = ramp();
  const [hatch, plain] = UNRECORDED[theme()].map(pixel);
  for (let place = 0; place < most.length; place++) {
    let colour = null;
    if (most[place] >= 0) colour = shades[Math.round(255 * height(most[place]))];
    else if (open[place]) colour = ((place % wide) + Math.floor(place / wide)) % 3 ? plain : hatch;
    if (!colour) continue; // what may not be attended stays clear
    const corner = Math.floor(place / wide) * down * image.width + (place % wide) * across;
    for (let row = 0; row < down; row++) pixels.fill(colour, corner + row * image.width, corner + row * image.width + across);
  }
  canvas.width = image.width;
  canvas.height = image.height;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// Bars in one direction: down the keys for attention received, across the queries for entropy.
function drawBars(canvas, amounts, upward) {
  const count = Math.min(THUMB, amounts.length);
  canvas.width = canvas.height = THUMB;
  const context = canvas.getContext("2d");
  context.fillStyle = shade(0);
  context.fillRect(0, 0, THUMB, THUMB);
  const pooled = new Float32Array(count);
  amounts.forEach((amount, n) => {
    const place = Math.floor((n * count) / amounts.length);
    pooled[place] = Math.max(pooled[place], amount);
  });
  pooled.forEach((amount, n) => {
    const from = Math.round((n * THUMB) / count);
    const to = Math.round(((n + 1) * THUMB) / count);
    const length = Math.round(amount * THUMB);
    context.fillStyle = shade(0.25 + 0.6 * amount);
    if (upward) context.fillRect(from, THUMB - length, to - from, length);
    else context.fillRect(0, from, length, to - from);
  });
}

function drawThumb(thumb) {
  const layer = data.layers[thumb.layer];
  const head = headOf(thumb.layer, thumb.head);
  if (state.show === "pattern") drawPattern(thumb.canvas, layer, head);
  else if (state.show === "received") {
    const most = max(head.received) || 1e-9;
    drawBars(thumb.canvas, Array.from(head.received, (amount) => Math.sqrt(amount / most)), true);
  } else if (state.show === "distance") drawShade(thumb.canvas, layer, layer.heads[thumb.head].distance);
  else {
    const place = (i) => Math.min(layer.queries - 1, Math.floor(((i + 0.5) * layer.queries) / (head.entropy || [0]).length));
    const part = (nats, i) => nats / Math.max(1e-9, Math.log(Math.max(1, head.cells ? allowed(layer, place(i)) : reach(layer, head, i))));
    drawBars(thumb.canvas, Array.from(head.entropy || [], (nats, i) => Math.min(1, part(nats, i))), false);
  }
}

// One colour for one number: how far a head looks, on a scale of doublings up to the whole text.
function drawShade(canvas, layer, distance) {
  canvas.width = canvas.height = THUMB;
  const context = canvas.getContext("2d");
  context.fillStyle = distance === null ? cssColour("--unknown") : shade(Math.log1p(distance) / Math.log1p(layer.keys));
  context.fillRect(0, 0, THUMB, THUMB);
}

const thumbs = [];

function buildOverview() {
  document.querySelector("main").classList.toggle("wide", dense);
  const groups = new Map(); // layers of one kind stand together
  data.layers.forEach((layer, n) => {
    const name = layer.label.split("layer")[0].trim().replace(/:$/, "") || "self";
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(n);
  });
  for (const [name, layers] of groups) {
    if (groups.size > 1) byId("grid").append(make("h3", {}, { self: "Self attention", cross: "Cross attention", encoder: "Encoder" }[name] || name));
    const heads = Math.max(...layers.map((n) => data.layers[n].heads.length));
    const box = make("div", { class: dense ? "grid dense" : "grid", role: "grid", "aria-label": `Heads, a row a layer: ${name}` });
    box.style.setProperty("--heads", heads);
    const labels = make("div", { class: "grid-row heads", role: "presentation", "aria-hidden": "true" }, make("span"));
    for (let head = 0; head < heads; head++) labels.append(make("span", {}, dense && head % 4 ? "" : String(head)));
    box.append(labels);
    for (const n of layers) {
      const layer = data.layers[n];
      const short = layer.label.replace(/^.*layer /, "").replace(", call ", "·");
      const row = make("div", { class: "grid-row", role: "row" }, make("span", { role: "rowheader", title: `${layer.label}: ${layer.name}` }, short));
      layer.heads.forEach((head, h) => {
        const canvas = make("canvas", { "aria-hidden": "true" });
        const button = make("button", { type: "button", role: "gridcell", class: "thumb", tabindex: "-1" }, canvas);
        button.setAttribute("aria-label", `${layer.label}, head ${h}: ${head.words}`);
        button.title = `${layer.label}, head ${h}: ${head.words}${head.distance === null ? "" : `, ${head.distance} tokens away`}`;
        button.addEventListener("click", () => chooseHead(n, h));
        button.addEventListener("keydown", moveInGrid);
        row.append(button);
        thumbs.push({ layer: n, head: h, row: n, button, canvas, pattern: head.pattern, stale: true });
      });
      box.append(row);
    }
    byId("grid").append(box);
  }
}

// Arrows move through the grid, and the choice follows.
function moveInGrid(event) {
  const layer = chosenLayer();
  let row = state.layer;
  let head = state.head;
  if (event.key === "ArrowRight") head++;
  else if (event.key === "ArrowLeft") head--;
  else if (event.key === "ArrowDown") row++;
  else if (event.key === "ArrowUp") row--;
  else if (event.key === "Home") head = 0;
  else if (event.key === "End") head = layer.heads.length - 1;
  else return;
  event.preventDefault();
  row = Math.max(0, Math.min(data.layers.length - 1, row));
  head = Math.max(0, Math.min(data.layers[row].heads.length - 1, head));
  chooseHead(row, head);
  thumbs.find((thumb) => thumb.layer === row && thumb.head === head).button.focus();
}

// Thumbnails are drawn a few at a time, so that a page of a thousand heads still answers at once.
let pending = 0;
function redrawThumbs() {
  for (const thumb of thumbs) thumb.stale = true;
  cancelAnimationFrame(pending);
  const some = () => {
    const until = performance.now() + 30;
    for (const thumb of thumbs) {
      if (!thumb.stale) continue;
      if (performance.now() > until) {
        pending = requestAnimationFrame(some);
        return;
      }
      drawThumb(thumb);
      thumb.stale = false;
    }
    byId("grid").dataset.drawn = state.show;
  };
  some();
  byId("grid-note").textContent = {
    pattern: "Down: queries. Across: keys. Darker is more attention.",
    received: "Across: keys. A bar is the attention a key receives from all queries.",
    entropy: "Down: queries. A bar is how wide a query looks, of as wide as it may.",
    distance: "How many tokens lie between a query and what it looks at: darker is farther.",
  }[state.show].replace(/([Dd])arker/, (word, d) => (theme() === "light" ? word : d === "D" ? "Brighter" : "brighter"));
}

function markThumbs() {
  for (const thumb of thumbs) {
    const chosen = thumb.layer === state.layer && thumb.head === state.head;
    thumb.button.setAttribute("aria-selected", chosen);
    thumb.button.tabIndex = chosen ? 0 : -1;
    if (chosen) reveal(byId("grid"), thumb.button.offsetTop - 24, thumb.button.offsetTop + thumb.button.offsetHeight + 8);
    thumb.button.classList.toggle("aside", state.habit !== null && thumb.pattern !== state.habit);
  }
}

function buildHabits() {
  const counts = new Map();
  for (const thumb of thumbs) counts.set(thumb.pattern, (counts.get(thumb.pattern) || 0) + 1);
  for (const [pattern, [sign, name]] of Object.entries(data.habits)) {
    if (!counts.has(pattern)) continue;
    const chip = make("button", { type: "button", class: "chip", "aria-pressed": "false" }, make("span", { class: "sign", "aria-hidden": "true" }, sign), name, make("span", { class: "count" }, String(counts.get(pattern))));
    chip.addEventListener("click", () => {
      state.habit = state.habit === pattern ? null : pattern;
      tell("habit");
    });
    on("habit", () => chip.setAttribute("aria-pressed", state.habit === pattern));
    byId("habits").append(chip);
  }
}

buildOverview();
buildHabits();
segments(
  byId("show"),
  [
    ["pattern", "Pattern", "Which key each query looks at"],
    ["received", "Received", "How much attention each key receives"],
    ["entropy", "Spread", "How wide each query looks (entropy)"],
    ["distance", "Distance", "How far each head looks"],
  ],
  () => state.show,
  (value) => (state.show = value),
  "show",
);
on("head habit", markThumbs);
on("show theme", redrawThumbs);
