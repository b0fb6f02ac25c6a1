// The overview: one row per layer, one column per head. A thumbnail shows the pattern of a head, the attention its keys receive, the
// entropy of its queries, or its mean distance.

import { max } from "d3-array";
import { allowed, data, headOf, reach } from "./decode.js";
import { cssColor, rampPosition, pixel, ramp, shade, theme } from "./color.js";
import { byId, make, reveal, segments } from "./dom.js";
import { chooseHead, chosenLayer, emit, on, state } from "./state.js";

const dense = data.layers.some((layer) => layer.heads.length > 16);
const THUMB = dense ? 32 : 96; // pixels per side, approximately
export const CELLS = 32; // cells per side of a head that the page holds in overview only, as in data.py
const POOL = dense ? 32 : 40; // cells per side; longer texts are max-pooled, so that a thin line stays visible
const UNRECORDED = { light: [[214, 217, 224], [240, 241, 244]], dark: [[44, 50, 62], [30, 35, 44]] }; // stroke and ground of the hatching

function drawPattern(canvas, layer, head) {
  const side = head.cells ? CELLS : POOL;
  const columns = Math.min(side, layer.keys);
  const rows = Math.min(side, layer.queries);
  const across = Math.ceil(THUMB / columns); // integer, or some cells would come out wider than others
  const down = Math.ceil(THUMB / rows);
  const image = new ImageData(columns * across, rows * down);
  const pixels = new Uint32Array(image.data.buffer);
  const most = new Float32Array(columns * rows).fill(-1); // -1: nothing recorded here
  const open = new Uint8Array(columns * rows); // 1: some key here may be attended, but was not recorded
  if (head.cells) {
    head.cells.forEach((byte, place) => {
      if (byte) most[place] = ((byte - 1) / 254) ** 2;
    });
    for (let y = 0; y < rows; y++) open.fill(1, y * columns, y * columns + Math.ceil((allowed(layer, Math.ceil(((y + 1) * layer.queries) / rows) - 1) * columns) / layer.keys));
  }
  for (let i = 0; i < layer.queries && !head.cells; i++) {
    const y = Math.floor((i * rows) / layer.queries);
    for (let n = head.start[i]; n < head.start[i + 1]; n++) {
      const place = y * columns + Math.floor((head.key[n] * columns) / layer.keys);
      if (head.weight[n] > most[place]) most[place] = head.weight[n];
    }
    if (!head.complete[i]) open.fill(1, y * columns, y * columns + Math.ceil((allowed(layer, i) * columns) / layer.keys));
  }
  const shades = ramp();
  const [hatch, plain] = UNRECORDED[theme()].map(pixel);
  for (let place = 0; place < most.length; place++) {
    let color = null;
    if (most[place] >= 0) color = shades[Math.round(255 * rampPosition(most[place]))];
    else if (open[place]) color = ((place % columns) + Math.floor(place / columns)) % 3 ? plain : hatch;
    if (!color) continue; // masked cells stay clear
    const corner = Math.floor(place / columns) * down * image.width + (place % columns) * across;
    for (let row = 0; row < down; row++) pixels.fill(color, corner + row * image.width, corner + row * image.width + across);
  }
  canvas.width = image.width;
  canvas.height = image.height;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// Draw bars: one column per key for the attention received, one row per query for the entropy.
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
    const queryAt = (i) => Math.min(layer.queries - 1, Math.floor(((i + 0.5) * layer.queries) / (head.entropy || [0]).length));
    const fraction = (nats, i) => nats / Math.max(1e-9, Math.log(Math.max(1, head.cells ? allowed(layer, queryAt(i)) : reach(layer, head, i))));
    drawBars(thumb.canvas, Array.from(head.entropy || [], (nats, i) => Math.min(1, fraction(nats, i))), false);
  }
}

// Fill a thumbnail with one color: the mean distance, on a log scale up to the length of the text.
function drawShade(canvas, layer, distance) {
  canvas.width = canvas.height = THUMB;
  const context = canvas.getContext("2d");
  context.fillStyle = distance === null ? cssColor("--unknown") : shade(Math.log1p(distance) / Math.log1p(layer.keys));
  context.fillRect(0, 0, THUMB, THUMB);
}

const thumbs = [];
const narrow = matchMedia("(max-width: 1100px)"); // one column, as in page.css

function buildOverview() {
  document.querySelector("main").classList.toggle("wide", dense);
  const groups = new Map(); // layers of one kind are grouped
  data.layers.forEach((layer, n) => {
    const name = layer.label.split("layer")[0].trim().replace(/:$/, "") || "self";
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(n);
  });
  for (const [name, layers] of groups) {
    if (groups.size > 1) byId("grid").append(make("h3", {}, { self: "Self attention", cross: "Cross attention", encoder: "Encoder" }[name] || name));
    const heads = Math.max(...layers.map((n) => data.layers[n].heads.length));
    const box = make("div", { class: dense ? "grid dense" : "grid", role: "grid", "aria-label": `Heads, one row per layer: ${name}` });
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
        button.addEventListener("click", () => {
          chooseHead(n, h);
          // Below the overview, the details would change out of sight.
          if (narrow.matches) byId("detail").scrollIntoView({ block: "start" });
        });
        button.addEventListener("keydown", moveInGrid);
        row.append(button);
        thumbs.push({ layer: n, head: h, row: n, button, canvas, pattern: head.pattern, stale: true });
      });
      box.append(row);
    }
    byId("grid").append(box);
  }
}

// Arrow keys move through the grid, and the selection follows.
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

// Thumbnails are drawn for 30 ms per frame, so that a page of a thousand heads stays responsive.
let pending = 0;
function redrawThumbs() {
  for (const thumb of thumbs) thumb.stale = true;
  cancelAnimationFrame(pending);
  const drawSome = () => {
    const until = performance.now() + 30;
    for (const thumb of thumbs) {
      if (!thumb.stale) continue;
      if (performance.now() > until) {
        pending = requestAnimationFrame(drawSome);
        return;
      }
      drawThumb(thumb);
      thumb.stale = false;
    }
    byId("grid").dataset.drawn = state.show;
  };
  drawSome();
  byId("grid-note").textContent = {
    pattern: "Each picture is a head. Rows: queries. Columns: keys. Darker means more attention. Layers and heads are numbered from 0.",
    received: "Columns: keys. A bar is the attention that a key receives from all queries.",
    entropy: "Rows: queries. A bar is the entropy of a query, relative to its maximum.",
    distance: "The mean distance in tokens between a query and the keys it attends to: darker means farther.",
  }[state.show].replace(/([Dd])arker/, (word, d) => (theme() === "light" ? word : d === "D" ? "Brighter" : "brighter"));
}

function markThumbs() {
  for (const thumb of thumbs) {
    const chosen = thumb.layer === state.layer && thumb.head === state.head;
    thumb.button.setAttribute("aria-selected", chosen);
    thumb.button.tabIndex = chosen ? 0 : -1;
    if (chosen) reveal(byId("grid"), thumb.button.offsetTop - 24, thumb.button.offsetTop + thumb.button.offsetHeight + 8);
    const kept = state.beside && thumb.layer === state.beside.layer && thumb.head === state.beside.head;
    thumb.button.classList.toggle("kept", Boolean(kept) && !chosen);
    thumb.button.classList.toggle("aside", state.habit !== null && thumb.pattern !== state.habit);
  }
}

function buildChips() {
  const counts = new Map();
  for (const thumb of thumbs) counts.set(thumb.pattern, (counts.get(thumb.pattern) || 0) + 1);
  for (const [pattern, [sign, name]] of Object.entries(data.habits)) {
    if (!counts.has(pattern)) continue;
    const chip = make("button", { type: "button", class: "chip", "aria-pressed": "false" }, make("span", { class: "sign", "aria-hidden": "true" }, sign), name, make("span", { class: "count" }, String(counts.get(pattern))));
    chip.addEventListener("click", () => {
      state.habit = state.habit === pattern ? null : pattern;
      emit("habit");
    });
    on("habit", () => chip.setAttribute("aria-pressed", state.habit === pattern));
    byId("habits").append(chip);
  }
}

buildOverview();
buildChips();
segments(
  byId("show"),
  [
    ["pattern", "Pattern", "Which keys each query attends to"],
    ["received", "Received", "How much attention each key receives"],
    ["entropy", "Spread", "How widely each query spreads its attention (entropy)"],
    ["distance", "Distance", "How far each head looks, in tokens"],
  ],
  () => state.show,
  (value) => (state.show = value),
  "show",
);
on("head habit beside", markThumbs);
on("show theme", redrawThumbs);
