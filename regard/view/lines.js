// The chosen head as lines: queries on the left, keys on the right, a curve for every weight, numbers beside the tokens.

const ROW = 26; // the height of a token's row in pixels, the same in page.css
const LEVELS = 16; // curves of like weight share one path, so that a page draws sixteen shapes and not ten thousand
const CURVES = 2400; // as many as are drawn at rest; the rest appear when a token is chosen
const SVG = "http://www.w3.org/2000/svg";

const linesView = { shape: "", asks: [], answers: [], cutoff: 0 };

function drawing(name, strength) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", name);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const paths = [];
  for (let level = 0; level < LEVELS; level++) {
    const path = document.createElementNS(SVG, "path");
    const t = (level + 0.5) / LEVELS;
    path.setAttribute("stroke-opacity", (0.05 + 0.93 * t ** strength).toFixed(3));
    path.setAttribute("stroke-width", (0.7 + 4.3 * t ** 1.6).toFixed(2));
    svg.append(path);
    paths.push(path);
  }
  return { svg, paths };
}

const rest = drawing("curves resting", 1.3);
const hot = drawing("curves hot", 0.7);

const curve = (i, j) => {
  const from = (i + 0.5) * ROW;
  const to = (j + 0.5) * ROW;
  return `M0 ${from}C45 ${from} 55 ${to} 100 ${to}`;
};

// curves: an iterable of [query, key, weight]
function draw({ paths }, curves) {
  const shapes = Array.from({ length: LEVELS }, () => []);
  for (const [i, j, weight] of curves) shapes[Math.min(LEVELS - 1, Math.floor(height(weight) * LEVELS))].push(curve(i, j));
  paths.forEach((path, level) => path.setAttribute("d", shapes[level].join("")));
}

function column(kind, tokens, offset) {
  const list = make("ol", { class: `column ${kind}`, role: "listbox", "aria-label": kind === "ask" ? "Queries: where a token looks" : "Keys: who looks at a token" });
  const items = tokens.map((token, n) => {
    const text = make("span", { class: `token${token[1] ? " continues" : ""}${token[2] ? " marker" : ""}` }, token[0]);
    const figure = make("span", { class: "figure" });
    const item = make("li", { role: "option", tabindex: n ? "-1" : "0", title: `${rawOf(token)}  (token ${n + offset})` }, ...(kind === "ask" ? [figure, text] : [text, figure]));
    item.dataset.token = n;
    list.append(item);
    return { item, text, figure };
  });
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
    const own = kind === "ask" ? linesView.asks : linesView.answers;
    const step = { ArrowDown: n + 1, ArrowUp: n - 1, Home: 0, End: own.length - 1, PageDown: n + 10, PageUp: n - 10 }[event.key];
    if (step !== undefined) walk(own, step);
    else if (event.key === (kind === "ask" ? "ArrowRight" : "ArrowLeft")) walk(other, n);
    else if (event.key === "Enter" || event.key === " ") pin(...target(n));
    else return;
    event.preventDefault();
  });
  return { list, items };
}

function walk(items, n) {
  const to = Math.max(0, Math.min(items.length - 1, n));
  items.forEach(({ item }, m) => (item.tabIndex = m === to ? 0 : -1));
  items[to].item.focus();
}

function buildLines() {
  const layer = chosenLayer();
  const shape = [layer.queryText, layer.keyText, layer.queries, layer.keys, layer.offset].join();
  if (linesView.shape === shape) return;
  linesView.shape = shape;
  const asks = column("ask", queryTokens(layer), layer.offset);
  const answers = column("answer", keyTokens(layer), 0);
  linesView.asks = asks.items;
  linesView.answers = answers.items;
  const tall = Math.max(layer.queries, layer.keys) * ROW;
  for (const { svg } of [rest, hot]) {
    svg.setAttribute("viewBox", `0 0 100 ${tall}`);
    svg.style.height = `${tall}px`;
  }
  const names = make("div", { class: "names", "aria-hidden": "true" });
  names.append(
    make("div", {}, make("span", { class: "what", id: "ask-what" }), make("b", { class: "ask" }, "Query")),
    make("span"),
    make("div", {}, make("b", { class: "answer" }, "Key"), make("span", { class: "what", id: "answer-what" })),
  );
  const field = make("div", { class: "field" }, rest.svg, hot.svg);
  const scroll = make("div", { class: "scroll" }, names, make("div", { class: "body" }, asks.list, field, answers.list));
  linesView.scroll = scroll;
  byId("lines").replaceChildren(scroll, make("p", { class: "note soft", id: "lines-note" }));
}

function drawLines() {
  buildLines();
  const layer = chosenLayer();
  const head = chosenHead();
  const markers = keyTokens(layer).map((token) => !state.markers && token[2]);
  const sorted = head.weight.filter((_, n) => !markers[head.key[n]]).sort();
  linesView.cutoff = Math.max(0.003, sorted.length > CURVES ? sorted[sorted.length - CURVES] : 0);
  const strong = [];
  let left = 0;
  for (let i = 0; i < layer.queries; i++) {
    for (let n = head.start[i]; n < head.start[i + 1]; n++) {
      if (markers[head.key[n]]) continue;
      if (head.weight[n] >= linesView.cutoff && strong.length < CURVES) strong.push([i, head.key[n], head.weight[n]]);
      else left++;
    }
  }
  draw(rest, strong);
  byId("lines-note").textContent = left && linesView.cutoff > 0.003 ? `Weights under ${three(linesView.cutoff)} get their line when a token is chosen.` : "";
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
  linesView.asks.forEach((part, i) => {
    if (!head.entropy) return setFigure(part, "", 0, KNOWN);
    const most = Math.log(Math.max(1, reach(layer, head, i)));
    return setFigure(part, head.entropy[i].toFixed(2), most ? Math.min(1, head.entropy[i] / most) : 0, KNOWN);
  });
  byId("ask-what").textContent = head.entropy ? "entropy" : "";
}

function receivedFigures(layer, head) {
  const scale = receivedScale(layer, head);
  linesView.answers.forEach((part, j) => setFigure(part, `${layer.receivedExact ? "" : "≥"}${head.received[j].toFixed(2)}`, scale(j), KNOWN));
  byId("answer-what").textContent = "received";
}

function drawFocus() {
  const layer = chosenLayer();
  const head = chosenHead();
  const { query, key } = state.focus || { query: null, key: null };
  const curves = [];
  if (query !== null) {
    for (let n = head.start[query]; n < head.start[query + 1]; n++) {
      if (key === null || head.key[n] === key) curves.push([query, head.key[n], head.weight[n]]);
    }
    linesView.answers.forEach((part, j) => weightFigure(part, cell(layer, head, query, j)));
    byId("answer-what").textContent = "weight";
    spreadFigures(layer, head);
  } else if (key !== null) {
    linesView.asks.forEach((part, i) => {
      const found = cell(layer, head, i, key);
      weightFigure(part, found);
      if (found.kind === KNOWN) curves.push([i, key, found.weight]);
    });
    byId("ask-what").textContent = "weight";
    receivedFigures(layer, head);
  } else {
    spreadFigures(layer, head);
    receivedFigures(layer, head);
  }
  draw(hot, curves);
  byId("lines").classList.toggle("focused", query !== null || key !== null);
  linesView.asks.forEach(({ item }, i) => {
    item.classList.toggle("chosen", i === query);
    item.setAttribute("aria-selected", i === query);
  });
  linesView.answers.forEach(({ item }, j) => {
    item.classList.toggle("chosen", j === key);
    item.setAttribute("aria-selected", j === key);
  });
}

// What was pinned elsewhere comes into sight here.
function showPinned() {
  if (!state.pin || !linesView.scroll) return;
  const n = state.pin.query ?? state.pin.key;
  reveal(linesView.scroll, n * ROW, (n + 3) * ROW);
}

on("head markers", drawLines);
on("pin", showPinned);
on("focus", drawFocus);
