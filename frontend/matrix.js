// The chosen head as a matrix: a row a query, a column a key. It is drawn a view at a time, so that its size does not matter: the
// wheel with Ctrl, two fingers, the keys + - 0 and the buttons zoom; dragging, the wheel and the arrow keys move. Point at a cell, tap
// it, or move over the cells with the arrow keys. The gestures are d3-zoom's.

import { mean } from "d3-array";
import { pointer, pointers, select } from "d3-selection";
import { zoom, zoomIdentity } from "d3-zoom";
import { BARRED, KNOWN, UNKNOWN, allowed, cell, data, headOf } from "./decode.js";
import { cssColour, height, ramp, texture } from "./colour.js";
import { atMost, byId, chosenHead, chosenLayer, keyTokens, make, on, pin, point, queryTokens, state, three } from "./state.js";
import { CELLS } from "./overview.js";

const LABELS = 11; // cells of this many pixels or more leave room for the tokens beside them
const LARGEST = 34; // pixels of a cell

export const matrices = [];

// `source` gives the layer and the head that are shown, or null.
function buildMatrix(box, source) {
  const canvas = make("canvas", { role: "img", "aria-label": "Matrix of weights" });
  const tip = make("div", { class: "tip", "aria-hidden": "true" });
  const mark = make("div", { class: "cursor", "aria-hidden": "true" });
  const across = make("div", { class: "band", "aria-hidden": "true" });
  const down = make("div", { class: "band", "aria-hidden": "true" });
  const sheet = make("div", { class: "sheet", tabindex: "0", role: "application", "aria-label": "Matrix of weights. The arrow keys move over the cells; plus, minus and 0 zoom." }, canvas, across, down, mark, tip);
  const name = make("p", { class: "name soft" });
  const buttons = make("div", { class: "zoom" });
  box.append(name, sheet, buttons);
  // x, y: the cell at the corner; size: pixels a cell, 0 for all that fits; place: where the cells stand in the sheet; moves: there is
  // more than is in sight
  const view = { box, source, canvas, tip, mark, across, down, sheet, name, x: 0, y: 0, size: 0, left: 0, top: 0, wide: 0, high: 0, cell: 1, place: zoomIdentity, moves: false, rest: 1 };
  view.gestures = zoom()
    .filter((event) => {
      if (event.type === "wheel") return event.ctrlKey || event.metaKey; // else it moves, below
      if (event.type === "touchstart") return view.moves || event.touches.length > 1; // else it scrolls the page
      return !event.button && !event.ctrlKey;
    })
    .wheelDelta((event) => -event.deltaY / 140 + Math.log2(view.rest))
    .clickDistance(4)
    .duration(0)
    .on("zoom", (event) => settle(view, event));
  const whole = select(sheet).call(view.gestures);
  const zoomBy = (factor) => view.gestures.scaleBy(whole, factor); // by 0: to all that fits
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

  const place = (event) => {
    const [x, y] = view.place.invert(pointer(event, sheet));
    const inside = x >= view.x && y >= view.y && x < view.x + view.wide && y < view.y + view.high;
    return inside ? [Math.floor(y), Math.floor(x)] : null;
  };
  sheet.addEventListener("pointermove", (event) => event.pointerType === "mouse" && !event.buttons && point(...(place(event) || [null, null])));
  sheet.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(null, null));
  sheet.addEventListener("click", (event) => place(event) && pin(...place(event)));
  sheet.addEventListener(
    "wheel",
    (event) => {
      // Where d3 can zoom no further, the browser would.
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
      show(view, state.focus.query, state.focus.key);
    } else if (event.key === "Enter" && state.focus) pin(state.focus.query, state.focus.key);
    else if (factor !== undefined) zoomBy(factor);
    else return;
    event.preventDefault();
  });
  return view;
}

// Matrices of one shape move together, so that what stands side by side stays beside itself.
function alike(view) {
  const shape = ({ layer }) => `${layer.queries} ${layer.keys}`;
  return matrices.filter((other) => other === view || (other.source() && shape(other.source()) === shape(view.source())));
}

// What d3 arrives at is drawn. Cells with labels are whole pixels wide, and what is at the pointers, or in the middle, stays there; the
// rest of a pixel is kept for the next turn of the wheel, so that fine ones add up.
function settle(view, { transform, sourceEvent }) {
  const { sheet, fit } = view;
  const size = transform.k < LABELS ? transform.k : Math.floor(transform.k);
  const held = sourceEvent ? pointers(sourceEvent, sheet) : [];
  const at = [sheet.clientWidth / 2, sheet.clientHeight / 2].map((middle, axis) => mean(held, (place) => place[axis]) ?? middle);
  const [x, y] = transform.invert(at);
  const [left, top] = size < LABELS ? [0, 0] : [fit.left, fit.top];
  view.rest = transform.k / size;
  arrange(view, x - (at[0] - left) / size, y - (at[1] - top) / size, size <= fit.size ? 0 : size);
}

function arrange(view, x, y, size) {
  for (const other of alike(view)) {
    Object.assign(other, { x, y, size });
    drawMatrix(other);
  }
}

// Move by so many cells; false where there is nothing to move to.
function move(view, x, y) {
  const before = [view.x, view.y];
  arrange(view, view.x + x, view.y + y, view.size);
  return view.x !== before[0] || view.y !== before[1];
}

// Bring a cell into view.
function show(view, query, key) {
  const inside = (n, from, count) => n === null || (n >= from && n + 1 <= from + count);
  if (inside(key, view.x, view.wide) && inside(query, view.y, view.high)) return;
  move(view, key === null ? 0 : key + 0.5 - view.wide / 2 - view.x, query === null ? 0 : query + 0.5 - view.high / 2 - view.y);
}

// The size of a cell at which the whole matrix stands in the room there is, and whether it leaves room for tokens.
function fitting(view, layer) {
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
  const high = Math.max(440, 0.74 * innerHeight);
  // One that is far higher than wide is as wide as there is room, and moves.
  const tall = layer.queries > 3 * layer.keys;
  const labelled = Math.min((room - left - 2) / layer.keys, tall ? LARGEST : (high - top) / layer.queries);
  const bare = Math.min(room / layer.keys, tall ? LARGEST : high / layer.queries, 0.99 * LABELS); // more would have labels, and not fit
  const size = labelled >= LABELS ? Math.floor(labelled) : bare;
  return { room, high, left, top, size: Math.min(size, LARGEST) };
}

function drawMatrix(view) {
  const chosen = view.source();
  if (!chosen || !view.box.clientWidth) return;
  const { layer, head } = chosen;
  const { canvas, sheet } = view;
  const fit = fitting(view, layer);
  const size = view.size || fit.size;
  const labelled = size >= LABELS;
  const [left, top] = labelled ? [fit.left, fit.top] : [0, 0];
  const [wholeAcross, wholeDown] = [size * layer.keys, size * layer.queries];
  const across = Math.min(wholeAcross, fit.room - left);
  const down = Math.min(wholeDown, fit.high - top);
  const corner = (n, most) => {
    const pixel = Math.max(0, Math.min(most, n * size));
    return (labelled ? Math.round(pixel) : pixel) / size;
  };
  Object.assign(view, { fit, cell: size, left, top, wide: across / size, high: down / size, moves: across < wholeAcross || down < wholeDown });
  view.x = corner(view.x, wholeAcross - across);
  view.y = corner(view.y, wholeDown - down);
  view.place = zoomIdentity.translate(left, top).scale(size).translate(-view.x, -view.y);
  view.gestures.scaleExtent([fit.size, LARGEST]);
  select(sheet).property("__zoom", view.place); // where d3 goes on from
  sheet.style.touchAction = view.moves ? "none" : "pan-x pan-y";
  const scale = Math.min(devicePixelRatio || 1, 2);
  canvas.width = Math.ceil((left + across) * scale);
  canvas.height = Math.ceil((top + down) * scale);
  canvas.style.width = sheet.style.width = `${left + across}px`;
  canvas.style.height = sheet.style.height = `${top + down}px`;
  const context = canvas.getContext("2d");
  const box = { x: Math.round(left * scale), y: Math.round(top * scale), wide: Math.max(1, Math.floor(across * scale)), high: Math.max(1, Math.floor(down * scale)) };
  const { image, kinds } = pixels(view, layer, head, box, size * scale);
  for (const kind of [UNKNOWN, BARRED]) fillKind(context, kinds, kind, scale, box);
  context.drawImage(asCanvas(image), box.x, box.y);
  context.setTransform(scale, 0, 0, scale, 0, 0);
  if (labelled) {
    context.fillStyle = cssColour("--panel"); // gaps between the cells
    for (let j = Math.floor(view.x) + 1; j < view.x + view.wide; j++) context.fillRect(view.place.applyX(j) - 0.5, top, 1, down);
    for (let i = Math.floor(view.y) + 1; i < view.y + view.high; i++) context.fillRect(left, view.place.applyY(i) - 0.5, across, 1);
    label(context, view, layer);
  }
  const told = layer.heads[chosen.index];
  canvas.setAttribute("aria-label", `Weights of ${layer.label}, head ${chosen.index}: ${layer.queries} queries by ${layer.keys} keys. ${told.sentence}`);
  view.name.textContent = matrices.some((other) => other !== view && other.source()) ? `${layer.label}, head ${chosen.index}: ${told.words}` : "";
  markCell(view);
}

// The pixels of the view: of several cells in one pixel, the largest weight; and which of them take a texture.
function pixels(view, layer, head, box, size) {
  const { wide, high } = box;
  const kinds = new Uint8Array(wide * high).fill(BARRED);
  const image = new ImageData(wide, high);
  const colours = new Uint32Array(image.data.buffer);
  const shades = ramp();
  const best = new Uint8Array(wide * high); // 1 + the place on the ramp; 0: nothing known
  const put = (x0, x1, y0, y1, tone) => {
    for (let y = y0; y < y1; y++) {
      for (let at = y * wide + x0; at < y * wide + x1; at++) {
        if (tone > best[at]) best[at] = tone;
      }
    }
  };
  const span = (n, from, most) => {
    const [start, end] = [n, n + 1].map((edge) => Math.floor((edge - from) * size + 1e-6)); // a whole number may have come out a hair less
    return [Math.max(0, start), Math.min(most, Math.max(start + 1, end))];
  };
  const unknown = (i, y0, y1) => {
    const end = Math.min(wide, Math.ceil((allowed(layer, i) - view.x) * size));
    for (let y = y0; y < y1 && end > 0; y++) kinds.fill(UNKNOWN, y * wide, y * wide + end);
  };
  const last = Math.min(layer.queries, Math.ceil(view.y + view.high));
  for (let i = Math.floor(view.y); i < last; i++) {
    const [y0, y1] = span(i, view.y, high);
    if (head.cells || !head.complete[i]) unknown(i, y0, y1);
    if (head.cells) continue;
    for (let n = head.start[i]; n < head.start[i + 1]; n++) {
      const [x0, x1] = span(head.key[n], view.x, wide);
      if (x0 < x1) put(x0, x1, y0, y1, 1 + Math.round(254 * height(head.weight[n])));
    }
  }
  if (head.cells) {
    const [columns, rows] = [Math.min(CELLS, layer.keys), Math.min(CELLS, layer.queries)];
    head.cells.forEach((byte, place) => {
      const column = place % columns;
      const row = Math.floor(place / columns);
      const edge = (n, count, whole, from, most) => Math.max(0, Math.min(most, Math.round(((n * whole) / count - from) * size)));
      put(
        edge(column, columns, layer.keys, view.x, wide), edge(column + 1, columns, layer.keys, view.x, wide),
        edge(row, rows, layer.queries, view.y, high), edge(row + 1, rows, layer.queries, view.y, high), byte,
      );
    });
  }
  for (let at = 0; at < best.length; at++) {
    if (!best[at]) continue;
    colours[at] = shades[Math.round(((best[at] - 1) * 255) / 254)];
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
  const mask = new ImageData(box.wide, box.high);
  const bytes = new Uint32Array(mask.data.buffer);
  for (let at = 0; at < kinds.length; at++) if (kinds[at] === kind) bytes[at] = 0xff000000;
  const sheet = asCanvas(mask);
  const paint = sheet.getContext("2d");
  paint.globalCompositeOperation = "source-in";
  paint.fillStyle = texture(paint, kind, scale);
  paint.fillRect(0, 0, sheet.width, sheet.height);
  context.drawImage(sheet, box.x, box.y);
}

function label(context, view, layer) {
  const { left, top, place } = view;
  const fit = (token, room) => {
    let text = token[0];
    while (text.length > 1 && context.measureText(text).width > room) text = `${text.replace(/…$/, "").slice(0, -1)}…`;
    return text;
  };
  context.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  context.textBaseline = "middle";
  context.fillStyle = cssColour("--soft");
  context.textAlign = "right";
  // The tokens of the cells whose middle is in sight, and where that is.
  const seen = (tokens, from, count) => {
    const first = Math.round(from);
    return tokens.slice(first, Math.round(from + count)).map((token, n) => [token, first + n + 0.5]);
  };
  seen(queryTokens(layer), view.y, view.high).forEach(([token, middle]) => context.fillText(fit(token, left - 8), left - 7, place.applyY(middle)));
  context.textAlign = "left";
  seen(keyTokens(layer), view.x, view.wide).forEach(([token, middle]) => {
    context.save();
    context.translate(place.applyX(middle), top - 7);
    context.rotate(-Math.PI / 2);
    context.fillText(fit(token, top - 8), 0, 0);
    context.restore();
  });
}

function lay(element, x, y, wide, high, shown) {
  element.hidden = !shown;
  if (!shown) return;
  element.style.transform = `translate(${x}px, ${y}px)`;
  element.style.width = `${wide}px`;
  element.style.height = `${high}px`;
}

// The cell, row or column that is pointed at, and its number in words.
function markCell(view) {
  const chosen = view.source();
  if (!chosen) return;
  const { layer, head } = chosen;
  const { left, top, tip, mark, across, down, place } = view;
  const { query, key } = state.focus || { query: null, key: null };
  const [right, bottom] = [left + view.wide * view.cell, top + view.high * view.cell];
  // What of the row and of the column is in sight, in pixels.
  const [y, toY] = [query, query + 1].map((n) => Math.max(top, Math.min(bottom, place.applyY(n))));
  const [x, toX] = [key, key + 1].map((n) => Math.max(left, Math.min(right, place.applyX(n))));
  const [thickX, thickY] = [Math.max(1, toX - x), Math.max(1, toY - y)];
  const seenRow = query !== null && toY > y;
  const seenColumn = key !== null && toX > x;
  lay(across, left, y, right - left, thickY, seenRow);
  lay(down, x, top, thickX, bottom - top, seenColumn);
  const cellular = seenRow && seenColumn;
  lay(mark, x, y, thickX, thickY, cellular);
  tip.hidden = !cellular;
  if (!cellular) return;
  const found = cell(layer, head, query, key);
  const told = { [KNOWN]: three(found.weight), [UNKNOWN]: `not recorded, ${atMost(found.weight)}`, [BARRED]: "may not attend" }[found.kind];
  tip.replaceChildren(make("span", {}, `${queryTokens(layer)[query][0]} → ${keyTokens(layer)[key][0]} `), make("b", {}, head.cells ? "in overview alone" : told));
  const wide = tip.offsetWidth;
  const beside = x + thickX + 8;
  tip.style.transform = `translate(${Math.max(0, beside + wide > view.sheet.clientWidth ? x - wide - 8 : beside)}px, ${Math.max(0, y - 34)}px)`;
}

buildMatrix(byId("matrix"), () => ({ layer: chosenLayer(), head: chosenHead(), index: state.head }));
buildMatrix(byId("beside"), () => state.beside && { layer: data.layers[state.beside.layer], head: headOf(state.beside.layer, state.beside.head), index: state.beside.head });
const drawMatrices = () => matrices.forEach(drawMatrix); // what is out of sight has no room, and is left
on("head view theme beside", drawMatrices);
on("focus", () => matrices.forEach(markCell));
on("pin", () => state.pin && matrices.forEach((view) => view.source() && show(view, state.pin.query, state.pin.key)));
