// The chosen head as a matrix: one row per query, one column per key. Only the visible part is drawn, so the cost does not depend on
// its size. Ctrl and the wheel, pinching, the keys + - 0 and the buttons zoom; dragging, the wheel and the arrow keys pan. A cell is
// focused by hovering, tapping or the arrow keys. The gestures are d3-zoom's.

import { mean } from "d3-array";
import { pointer, pointers, select } from "d3-selection";
import { zoom, zoomIdentity } from "d3-zoom";
import { MASKED, KNOWN, UNKNOWN, allowed, cell, data, headOf } from "./decode.js";
import { cssColor, rampPosition, ramp, texture } from "./color.js";
import { bdi, byId, make } from "./dom.js";
import { fixed3, upperBound } from "./format.js";
import { chosenHead, chosenLayer, currentFocus, inputToken, keyTokens, on, pin, point, queryTokens, state } from "./state.js";
import { CELLS } from "./overview.js";

const LABELS = 11; // pixels per cell from which tokens are written beside the matrix
const LARGEST = 34; // pixels per cell at the largest zoom

export const matrices = [];

// `source` returns {layer, head, index}, what the matrix shows, or null.
function buildMatrix(box, source) {
  const canvas = make("canvas", { role: "img", "aria-label": "Matrix of weights" });
  const tip = make("div", { class: "tip", "aria-hidden": "true" });
  const mark = make("div", { class: "cursor", "aria-hidden": "true" });
  const across = make("div", { class: "band", "aria-hidden": "true" });
  const down = make("div", { class: "band", "aria-hidden": "true" });
  const sheet = make("div", { class: "sheet", tabindex: "0", role: "application", "aria-label": "Matrix of weights. The arrow keys move over the cells; plus, minus and 0 zoom." }, canvas, across, down, mark, tip);
  const name = make("p", { class: "name soft" });
  const axes = make("p", { class: "axis soft" }, "Rows: ", make("b", { class: "query" }, "queries"), " ↓   Columns: ", make("b", { class: "key" }, "keys"), " →");
  const buttons = make("div", { class: "zoom" });
  box.append(name, axes, sheet, buttons);
  // x, y: the cell at the top left corner; size: pixels per cell, 0 to fit the whole matrix; place: the transform from cells to
  // pixels; moves: whether part of the matrix is out of view; rest: the fraction of a pixel that settle() rounded off
  const view = { box, source, canvas, tip, mark, across, down, sheet, name, x: 0, y: 0, size: 0, left: 0, top: 0, width: 0, height: 0, cell: 1, place: zoomIdentity, moves: false, rest: 1 };
  view.gestures = zoom()
    .filter((event) => {
      if (event.type === "wheel") return event.ctrlKey || event.metaKey; // otherwise it pans, below
      if (event.type === "touchstart") return view.moves || event.touches.length > 1; // otherwise it scrolls the page
      return !event.button && !event.ctrlKey;
    })
    .wheelDelta((event) => -event.deltaY / 140 + Math.log2(view.rest))
    .clickDistance(4)
    .duration(0)
    .on("zoom", (event) => settle(view, event));
  const whole = select(sheet).call(view.gestures);
  const zoomBy = (factor) => view.gestures.scaleBy(whole, factor); // a factor of 0 fits the whole matrix
  matrices.push(view);
  let room = 0;
  new ResizeObserver(() => {
    if (box.clientWidth === room) return;
    room = box.clientWidth;
    drawMatrix(view);
  }).observe(box);

  for (const [text, label, by] of [["−", "Zoom out", 1 / 1.6], ["Fit", "Show the whole matrix", 0], ["+", "Zoom in", 1.6]]) {
    const button = make("button", { type: "button", class: "quiet", "aria-label": label }, text);
    button.addEventListener("click", () => zoomBy(by));
    buttons.append(button);
  }

  const cellAt = (event) => {
    const [x, y] = view.place.invert(pointer(event, sheet));
    const inside = x >= view.x && y >= view.y && x < view.x + view.width && y < view.y + view.height;
    return inside ? [Math.floor(y), Math.floor(x)] : null;
  };
  sheet.addEventListener("pointermove", (event) => event.pointerType === "mouse" && !event.buttons && point(...(cellAt(event) || [null, null])));
  sheet.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(null, null));
  sheet.addEventListener("click", (event) => cellAt(event) && pin(...cellAt(event)));
  sheet.addEventListener(
    "wheel",
    (event) => {
      // At its limits d3 ignores the event, and the browser would zoom the page.
      if (event.ctrlKey || event.metaKey || (view.moves && move(view, event.deltaX / view.cell, event.deltaY / view.cell))) event.preventDefault();
    },
    { passive: false },
  );
  sheet.addEventListener("focusout", () => point(null, null));
  sheet.addEventListener("keydown", (event) => {
    const step = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key];
    const factor = { "+": 1.6, "=": 1.6, "-": 1 / 1.6, 0: 0 }[event.key];
    const focus = state.focus || {};
    if (step) {
      const { layer } = source();
      const first = focus.query == null || focus.key == null;
      const i = first ? focus.query ?? Math.floor(view.y) : focus.query + step[0];
      const j = first ? focus.key ?? Math.floor(view.x) : focus.key + step[1];
      point(Math.max(0, Math.min(layer.queries - 1, i)), Math.max(0, Math.min(layer.keys - 1, j)));
      showCell(view, state.focus.query, state.focus.key);
    } else if (event.key === "Enter" && state.focus) pin(state.focus.query, state.focus.key);
    else if (factor !== undefined) zoomBy(factor);
    else return;
    event.preventDefault();
  });
  return view;
}

// The matrices of the same shape as `view`: they zoom and pan together.
function linkedViews(view) {
  const shape = ({ layer }) => `${layer.queries} ${layer.keys}`;
  return matrices.filter((other) => other === view || (other.source() && shape(other.source()) === shape(view.source())));
}

// Apply a transform of d3-zoom. Labeled cells have an integer width, and the cell under the pointers, or at the center, stays in
// place. The fraction that rounding removes is carried over to the next wheel event, so that small steps add up.
function settle(view, { transform, sourceEvent }) {
  const { sheet, fit } = view;
  const size = transform.k < LABELS ? transform.k : Math.floor(transform.k);
  const touched = sourceEvent ? pointers(sourceEvent, sheet) : [];
  const at = [sheet.clientWidth / 2, sheet.clientHeight / 2].map((middle, axis) => mean(touched, (position) => position[axis]) ?? middle);
  const [x, y] = transform.invert(at);
  const [left, top] = size < LABELS ? [0, 0] : [fit.left, fit.top];
  view.rest = transform.k / size;
  setView(view, x - (at[0] - left) / size, y - (at[1] - top) / size, size <= fit.size ? 0 : size);
}

// Set the view of all linked matrices.
function setView(view, x, y, size) {
  for (const other of linkedViews(view)) {
    Object.assign(other, { x, y, size });
    drawMatrix(other);
  }
}

// Pan by x and y cells; false if there is nothing to pan to.
function move(view, x, y) {
  const before = [view.x, view.y];
  setView(view, view.x + x, view.y + y, view.size);
  return view.x !== before[0] || view.y !== before[1];
}

// Pan until a cell is visible.
function showCell(view, query, key) {
  const inside = (n, from, count) => n === null || (n >= from && n + 1 <= from + count);
  if (inside(key, view.x, view.width) && inside(query, view.y, view.height)) return;
  move(view, key === null ? 0 : key + 0.5 - view.width / 2 - view.x, query === null ? 0 : query + 0.5 - view.height / 2 - view.y);
}

// The largest size of a cell at which the whole matrix fits, and the space that labels take.
function fitSize(view, layer) {
  const context = view.canvas.getContext("2d");
  context.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  const room = view.box.clientWidth;
  const longest = (tokens) => {
    let most = 0;
    for (const token of tokens.length > 400 ? tokens.slice(0, 400) : tokens) most = Math.max(most, Math.ceil(context.measureText(token[0]).width));
    return Math.min(84, most) + 10;
  };
  const left = longest(queryTokens(layer));
  const top = longest(keyTokens(layer));
  const height = Math.max(440, 0.74 * innerHeight);
  // A matrix that is much taller than wide fits by its width, and pans vertically.
  const tall = layer.queries > 3 * layer.keys;
  const labeled = Math.min((room - left - 2) / layer.keys, tall ? LARGEST : (height - top) / layer.queries);
  const bare = Math.min(room / layer.keys, tall ? LARGEST : height / layer.queries, 0.99 * LABELS); // larger cells would have labels, and not fit
  const size = labeled >= LABELS ? Math.floor(labeled) : bare;
  return { room, height, left, top, size: Math.min(size, LARGEST) };
}

function drawMatrix(view) {
  const chosen = view.source();
  if (!chosen || !view.box.clientWidth) return;
  const { layer, head } = chosen;
  const { canvas, sheet } = view;
  const fit = fitSize(view, layer);
  const size = view.size || fit.size;
  const labeled = size >= LABELS;
  const [left, top] = labeled ? [fit.left, fit.top] : [0, 0];
  const [wholeAcross, wholeDown] = [size * layer.keys, size * layer.queries];
  const across = Math.min(wholeAcross, fit.room - left);
  const down = Math.min(wholeDown, fit.height - top);
  const corner = (n, most) => {
    const pixel = Math.max(0, Math.min(most, n * size));
    return (labeled ? Math.round(pixel) : pixel) / size;
  };
  Object.assign(view, { fit, cell: size, left, top, width: across / size, height: down / size, moves: across < wholeAcross || down < wholeDown });
  view.x = corner(view.x, wholeAcross - across);
  view.y = corner(view.y, wholeDown - down);
  view.place = zoomIdentity.translate(left, top).scale(size).translate(-view.x, -view.y);
  view.gestures.scaleExtent([fit.size, LARGEST]);
  select(sheet).property("__zoom", view.place); // the state that d3-zoom continues from
  sheet.style.touchAction = view.moves ? "none" : "pan-x pan-y";
  const scale = Math.min(devicePixelRatio || 1, 2);
  canvas.width = Math.ceil((left + across) * scale);
  canvas.height = Math.ceil((top + down) * scale);
  canvas.style.width = sheet.style.width = `${left + across}px`;
  canvas.style.height = sheet.style.height = `${top + down}px`;
  const context = canvas.getContext("2d");
  const box = { x: Math.round(left * scale), y: Math.round(top * scale), width: Math.max(1, Math.floor(across * scale)), height: Math.max(1, Math.floor(down * scale)) };
  const { image, kinds } = renderPixels(view, layer, head, box, size * scale);
  for (const kind of [UNKNOWN, MASKED]) fillKind(context, kinds, kind, scale, box);
  context.drawImage(asCanvas(image), box.x, box.y);
  context.setTransform(scale, 0, 0, scale, 0, 0);
  if (labeled) {
    context.fillStyle = cssColor("--panel"); // gaps between the cells
    for (let j = Math.floor(view.x) + 1; j < view.x + view.width; j++) context.fillRect(view.place.applyX(j) - 0.5, top, 1, down);
    for (let i = Math.floor(view.y) + 1; i < view.y + view.height; i++) context.fillRect(left, view.place.applyY(i) - 0.5, across, 1);
    drawLabels(context, view, layer);
  }
  const summary = layer.heads[chosen.index];
  canvas.setAttribute("aria-label", `Weights of ${layer.label}, head ${chosen.index}: ${layer.queries} queries by ${layer.keys} keys. ${summary.sentence}`);
  view.name.textContent = matrices.some((other) => other !== view && other.source()) ? `${layer.label}, head ${chosen.index}: ${summary.words}` : "";
  markCell(view);
}

// The pixels of the view, max-pooled where several cells share one, and the kind of each pixel.
function renderPixels(view, layer, head, box, size) {
  const { width, height } = box;
  const kinds = new Uint8Array(width * height).fill(MASKED);
  const image = new ImageData(width, height);
  const colors = new Uint32Array(image.data.buffer);
  const shades = ramp();
  const best = new Uint8Array(width * height); // 1 + the position on the ramp; 0: nothing recorded
  const put = (x0, x1, y0, y1, tone) => {
    for (let y = y0; y < y1; y++) {
      for (let at = y * width + x0; at < y * width + x1; at++) {
        if (tone > best[at]) best[at] = tone;
      }
    }
  };
  const span = (n, from, most) => {
    const [start, end] = [n, n + 1].map((edge) => Math.floor((edge - from) * size + 1e-6)); // the product may be just below an integer
    return [Math.max(0, start), Math.min(most, Math.max(start + 1, end))];
  };
  const unknown = (i, y0, y1) => {
    const end = Math.min(width, Math.ceil((allowed(layer, i) - view.x) * size));
    for (let y = y0; y < y1 && end > 0; y++) kinds.fill(UNKNOWN, y * width, y * width + end);
  };
  const last = Math.min(layer.queries, Math.ceil(view.y + view.height));
  for (let i = Math.floor(view.y); i < last; i++) {
    const [y0, y1] = span(i, view.y, height);
    if (head.cells || !head.complete[i]) unknown(i, y0, y1);
    if (head.cells) continue;
    for (let n = head.start[i]; n < head.start[i + 1]; n++) {
      const [x0, x1] = span(head.key[n], view.x, width);
      if (x0 < x1) put(x0, x1, y0, y1, 1 + Math.round(254 * rampPosition(head.weight[n])));
    }
  }
  if (head.cells) {
    const [columns, rows] = [Math.min(CELLS, layer.keys), Math.min(CELLS, layer.queries)];
    head.cells.forEach((byte, place) => {
      const column = place % columns;
      const row = Math.floor(place / columns);
      const edge = (n, count, whole, from, most) => Math.max(0, Math.min(most, Math.round(((n * whole) / count - from) * size)));
      put(
        edge(column, columns, layer.keys, view.x, width), edge(column + 1, columns, layer.keys, view.x, width),
        edge(row, rows, layer.queries, view.y, height), edge(row + 1, rows, layer.queries, view.y, height), byte,
      );
    });
  }
  for (let at = 0; at < best.length; at++) {
    if (!best[at]) continue;
    colors[at] = shades[Math.round(((best[at] - 1) * 255) / 254)];
    kinds[at] = KNOWN;
  }
  return { image, kinds };
}

function asCanvas(image) {
  const canvas = document.createElement("canvas");
  canvas.width = image.width;
  canvas.height = image.height;
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function fillKind(context, kinds, kind, scale, box) {
  if (!kinds.includes(kind)) return;
  const mask = new ImageData(box.width, box.height);
  const bytes = new Uint32Array(mask.data.buffer);
  for (let at = 0; at < kinds.length; at++) if (kinds[at] === kind) bytes[at] = 0xff000000;
  const sheet = asCanvas(mask);
  const paint = sheet.getContext("2d");
  paint.globalCompositeOperation = "source-in";
  paint.fillStyle = texture(paint, kind, scale);
  paint.fillRect(0, 0, sheet.width, sheet.height);
  context.drawImage(sheet, box.x, box.y);
}

function drawLabels(context, view, layer) {
  const { left, top, place } = view;
  const fit = (token, room) => {
    let text = token[0];
    while (text.length > 1 && context.measureText(text).width > room) text = `${text.replace(/…$/, "").slice(0, -1)}…`;
    return text;
  };
  context.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  context.textBaseline = "middle";
  context.fillStyle = cssColor("--soft");
  context.textAlign = "right";
  // The tokens of the cells whose center is visible, and the positions of the centers.
  const visible = (tokens, from, count) => {
    const first = Math.round(from);
    return tokens.slice(first, Math.round(from + count)).map((token, n) => [token, first + n + 0.5]);
  };
  visible(queryTokens(layer), view.y, view.height).forEach(([token, middle]) => context.fillText(fit(token, left - 8), left - 7, place.applyY(middle)));
  context.textAlign = "left";
  visible(keyTokens(layer), view.x, view.width).forEach(([token, middle]) => {
    context.save();
    context.translate(place.applyX(middle), top - 7);
    context.rotate(-Math.PI / 2);
    context.fillText(fit(token, top - 8), 0, 0);
    context.restore();
  });
}

function placeElement(element, x, y, width, height, visible) {
  element.hidden = !visible;
  if (!visible) return;
  element.style.transform = `translate(${x}px, ${y}px)`;
  element.style.width = `${width}px`;
  element.style.height = `${height}px`;
}

// Mark the focused cell, row or column, and show the weight of the cell in a tooltip.
function markCell(view) {
  const chosen = view.source();
  if (!chosen) return;
  const { layer, head } = chosen;
  const { left, top, tip, mark, across, down, place } = view;
  const { query, key } = currentFocus();
  const [right, bottom] = [left + view.width * view.cell, top + view.height * view.cell];
  // The visible part of the row and of the column, in pixels.
  const [y, toY] = [query, query + 1].map((n) => Math.max(top, Math.min(bottom, place.applyY(n))));
  const [x, toX] = [key, key + 1].map((n) => Math.max(left, Math.min(right, place.applyX(n))));
  const [thickX, thickY] = [Math.max(1, toX - x), Math.max(1, toY - y)];
  const rowVisible = query !== null && toY > y;
  const columnVisible = key !== null && toX > x;
  placeElement(across, left, y, right - left, thickY, rowVisible);
  placeElement(down, x, top, thickX, bottom - top, columnVisible);
  const cellVisible = rowVisible && columnVisible;
  placeElement(mark, x, y, thickX, thickY, cellVisible);
  tip.hidden = !cellVisible;
  if (!cellVisible) return;
  const entry = cell(layer, head, query, key);
  const text = { [KNOWN]: fixed3(entry.weight), [UNKNOWN]: `not recorded, ${upperBound(entry.weight)}`, [MASKED]: "masked" }[entry.kind];
  const input = inputToken(layer, query);
  tip.replaceChildren(
    make("span", {}, bdi(queryTokens(layer)[query][0]), " → ", bdi(keyTokens(layer)[key][0]), " "),
    make("b", {}, head.cells ? "overview only" : text),
    ...(input === null ? [] : [make("span", { class: "more" }, ` produced after “${input}”`)]),
  );
  const width = tip.offsetWidth;
  const beside = x + thickX + 8;
  tip.style.transform = `translate(${Math.max(0, beside + width > view.sheet.clientWidth ? x - width - 8 : beside)}px, ${Math.max(0, y - 34)}px)`;
}

buildMatrix(byId("matrix"), () => ({ layer: chosenLayer(), head: chosenHead(), index: state.head }));
buildMatrix(byId("beside"), () => state.beside && { layer: data.layers[state.beside.layer], head: headOf(state.beside.layer, state.beside.head), index: state.beside.head });
const drawMatrices = () => matrices.forEach(drawMatrix); // hidden matrices have no size, and are skipped
on("head view theme beside", drawMatrices);
on("focus", () => matrices.forEach(markCell));
on("pin", () => state.pin && matrices.forEach((view) => view.source() && showCell(view, state.pin.query, state.pin.key)));
