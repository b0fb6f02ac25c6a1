// The chosen head as a matrix: a row a query, a column a key. Point at a cell, or move over the cells with the arrow keys.

const matrixView = { cell: 0, left: 0, top: 0 };
const LABELS = 11; // cells of this many pixels or more leave room for the tokens beside them

function buildMatrix() {
  const canvas = make("canvas", { role: "img" });
  const tip = make("div", { class: "tip", "aria-hidden": "true" });
  const mark = make("div", { class: "cursor", "aria-hidden": "true" });
  const across = make("div", { class: "band", "aria-hidden": "true" });
  const down = make("div", { class: "band", "aria-hidden": "true" });
  const sheet = make("div", { class: "sheet", tabindex: "0", role: "application", "aria-label": "Matrix of weights. The arrow keys move over the cells." }, canvas, across, down, mark, tip);
  byId("matrix").append(make("div", { class: "scroll" }, sheet));
  Object.assign(matrixView, { canvas, tip, mark, across, down, sheet });

  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    const j = Math.floor((event.clientX - box.left - matrixView.left) / matrixView.cell);
    const i = Math.floor((event.clientY - box.top - matrixView.top) / matrixView.cell);
    const layer = chosenLayer();
    return i >= 0 && j >= 0 && i < layer.queries && j < layer.keys ? [i, j] : null;
  };
  sheet.addEventListener("pointermove", (event) => {
    if (event.pointerType === "mouse") point(...(place(event) || [null, null]));
  });
  sheet.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(null, null));
  sheet.addEventListener("click", (event) => {
    const found = place(event);
    if (found) pin(...found);
  });
  sheet.addEventListener("focusout", () => point(null, null));
  sheet.addEventListener("keydown", (event) => {
    const step = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key];
    const focus = state.focus || {};
    if (step) {
      const layer = chosenLayer();
      const first = focus.query == null || focus.key == null;
      const i = first ? focus.query || 0 : focus.query + step[0];
      const j = first ? focus.key || 0 : focus.key + step[1];
      point(Math.max(0, Math.min(layer.queries - 1, i)), Math.max(0, Math.min(layer.keys - 1, j)));
    } else if (event.key === "Enter" && state.focus) pin(focus.query, focus.key);
    else return;
    event.preventDefault();
  });
}

// The picture of the cells, a pixel a cell, and masks of the cells that take a texture.
function cells(layer, head) {
  const size = layer.keys * layer.queries;
  const kinds = new Uint8Array(size).fill(BARRED);
  const image = new ImageData(layer.keys, layer.queries);
  const ramp = tables[theme()];
  for (let i = 0; i < layer.queries; i++) {
    const from = i * layer.keys;
    if (!head.complete[i]) kinds.fill(UNKNOWN, from, from + allowed(layer, i));
    for (let n = head.start[i]; n < head.start[i + 1]; n++) {
      const colour = ramp[Math.round(255 * height(head.weight[n]))];
      const at = from + head.key[n];
      kinds[at] = KNOWN;
      image.data[4 * at] = colour[0];
      image.data[4 * at + 1] = colour[1];
      image.data[4 * at + 2] = colour[2];
      image.data[4 * at + 3] = 255;
    }
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

function fillKind(context, layer, kinds, kind, scale, box) {
  if (!kinds.includes(kind)) return;
  const mask = new ImageData(layer.keys, layer.queries);
  kinds.forEach((found, at) => (mask.data[4 * at + 3] = found === kind ? 255 : 0));
  const sheet = document.createElement("canvas");
  sheet.width = Math.ceil(box.wide);
  sheet.height = Math.ceil(box.high);
  const paint = sheet.getContext("2d");
  paint.imageSmoothingEnabled = false;
  paint.drawImage(asCanvas(mask), 0, 0, box.wide, box.high);
  paint.globalCompositeOperation = "source-in";
  paint.fillStyle = texture(paint, kind, scale);
  paint.fillRect(0, 0, sheet.width, sheet.height);
  context.drawImage(sheet, box.x, box.y);
}

function drawMatrix() {
  if (state.view === "lines") return;
  const layer = chosenLayer();
  const head = chosenHead();
  const { canvas, sheet } = matrixView;
  const context = canvas.getContext("2d");
  const font = `12px ${getComputedStyle(document.body).fontFamily}`;
  context.font = font;
  const room = byId("matrix").clientWidth;
  if (!room) return;
  const longest = (tokens) => Math.min(84, Math.max(0, ...tokens.map((token) => Math.ceil(context.measureText(token[0]).width))) + 10);
  let left = longest(queryTokens(layer));
  let top = longest(keyTokens(layer));
  let size = (room - left - 2) / layer.keys;
  const labelled = size >= LABELS;
  if (!labelled) {
    left = top = 0;
    size = room / layer.keys;
  }
  size = Math.min(Math.max(2, size), 34, 8000 / Math.max(layer.keys, layer.queries));
  if (labelled) size = Math.floor(size);
  Object.assign(matrixView, { cell: size, left, top });
  const wide = left + size * layer.keys;
  const high = top + size * layer.queries;
  const scale = Math.min(devicePixelRatio || 1, 12000 / Math.max(wide, high));
  canvas.width = Math.ceil(wide * scale);
  canvas.height = Math.ceil(high * scale);
  canvas.style.width = sheet.style.width = `${wide}px`;
  canvas.style.height = sheet.style.height = `${high}px`;
  const { image, kinds } = cells(layer, head);
  const box = { x: left * scale, y: top * scale, wide: size * layer.keys * scale, high: size * layer.queries * scale };
  context.imageSmoothingEnabled = size < 1;
  for (const kind of [UNKNOWN, BARRED]) fillKind(context, layer, kinds, kind, scale, box);
  context.drawImage(asCanvas(image), box.x, box.y, box.wide, box.high);
  context.setTransform(scale, 0, 0, scale, 0, 0);
  if (labelled) {
    context.fillStyle = cssColour("--panel"); // gaps between the cells
    for (let j = 1; j < layer.keys; j++) context.fillRect(left + j * size - 0.5, top, 1, size * layer.queries);
    for (let i = 1; i < layer.queries; i++) context.fillRect(left, top + i * size - 0.5, size * layer.keys, 1);
    label(context, layer, font, left, top, size);
  }
  canvas.setAttribute("aria-label", `Weights of ${layer.label}, head ${state.head}: ${layer.queries} queries by ${layer.keys} keys. ${layer.heads[state.head].sentence}`);
  markCell();
}

function label(context, layer, font, left, top, size) {
  const fit = (token, room) => {
    let text = token[0];
    while (text.length > 1 && context.measureText(text).width > room) text = `${text.replace(/…$/, "").slice(0, -1)}…`;
    return text;
  };
  context.font = font;
  context.textBaseline = "middle";
  context.fillStyle = cssColour("--soft");
  context.textAlign = "right";
  queryTokens(layer).forEach((token, i) => context.fillText(fit(token, left - 8), left - 7, top + (i + 0.5) * size));
  context.textAlign = "left";
  keyTokens(layer).forEach((token, j) => {
    context.save();
    context.translate(left + (j + 0.5) * size, top - 7);
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
function markCell() {
  const { cell: size, left, top, tip, mark, across, down } = matrixView;
  const layer = chosenLayer();
  const { query, key } = state.focus || { query: null, key: null };
  lay(across, left, top + query * size, layer.keys * size, size, query !== null);
  lay(down, left + key * size, top, size, layer.queries * size, key !== null);
  const cellular = query !== null && key !== null;
  lay(mark, left + key * size, top + query * size, size, size, cellular);
  tip.hidden = !cellular;
  if (!cellular) return;
  const found = cell(layer, chosenHead(), query, key);
  const told = { [KNOWN]: three(found.weight), [UNKNOWN]: `not recorded, ${atMost(found.weight)}`, [BARRED]: "may not attend" }[found.kind];
  tip.replaceChildren(make("span", {}, `${queryTokens(layer)[query][0]} → ${keyTokens(layer)[key][0]} `), make("b", {}, told));
  const wide = tip.offsetWidth;
  const across_ = left + (key + 1) * size + 8;
  const x = across_ + wide > matrixView.sheet.clientWidth ? left + key * size - wide - 8 : across_;
  tip.style.transform = `translate(${Math.max(0, x)}px, ${Math.max(0, top + query * size - 34)}px)`;
}

buildMatrix();
on("head view theme", drawMatrix);
on("focus", markCell);
addEventListener("resize", () => requestAnimationFrame(drawMatrix));
