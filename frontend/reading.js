// The text, shaded by the chosen head, and the status line at the bottom of the page, which states the weights in numbers.

import { max } from "d3-array";
import { MASKED, KNOWN, UNKNOWN, allowed, cell, data, reach } from "./decode.js";
import { rampPosition, textColorOn, shade, theme } from "./color.js";
import { byId, make, reveal } from "./dom.js";
import { fixed3, plural, upperBound } from "./format.js";
import { chosenHead, chosenLayer, currentFocus, inputToken, keyTokens, on, pin, point, queryTokens, rawOf, state } from "./state.js";

const HINT = matchMedia("(pointer: coarse)").matches
  ? "Tap a token to see what it attends to; tap it again to release it."
  : "Hover over a token to see what it attends to. Click pins it, Escape releases it; the arrow keys move.";

const CHUNK = 128; // tokens per chunk: a longer text is created, shown and shaded chunk by chunk

const flows = data.texts.map((text, index) => {
  const box = make("p", { dir: "auto", class: `flow${text.length > 60 ? " long" : ""}${text.length > 160 ? " endless" : ""}` });
  if (text.length > 160) box.tabIndex = 0; // scrollable boxes must be reachable by keyboard
  const note = make("span", { class: "flow-note soft" });
  const name = data.texts.length > 1 ? make("span", { class: "flow-name" }, data.names[index]) : null;
  byId("texts").append(make("div", { class: "text" }, name, box, note));
  const flow = { text, box, note, index, chunks: [], shown: new Set() };
  // Chunks are created when they become visible, and shaded only while they are.
  const observer = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        const n = Number(entry.target.dataset.chunk);
        if (entry.isIntersecting) {
          flow.shown.add(n);
          makeChunk(flow, n);
        } else flow.shown.delete(n);
      }
      drawText(flow);
    },
    { root: text.length > 160 ? box : null, rootMargin: "300px" },
  );
  for (let from = 0, to = 0; from < text.length; from = to) {
    to = endOfChunk(text, from);
    const tokens = text.slice(from, to);
    const element = make("span", { class: text.length > CHUNK ? "chunk" : "" });
    element.dataset.chunk = flow.chunks.length;
    const letters = tokens.reduce((sum, token) => sum + token[0].length + (token[1] ? 0 : 1), 0);
    if (text.length > CHUNK) element.style.containIntrinsicHeight = `auto ${Math.ceil((letters * 8.2) / 1200) * 30}px`;
    flow.chunks.push({ element, from, tokens, words: null });
    box.append(element, " ");
    if (text.length > CHUNK) observer.observe(element);
    else {
      flow.shown.add(0);
      makeChunk(flow, 0);
    }
  }
  const side = () => {
    const layer = chosenLayer();
    return layer.queryText === index ? "query" : layer.keyText === index ? "key" : null;
  };
  const target = (event) => {
    const word = event.target.closest(".word");
    if (!word || !side()) return null;
    return toQueryOrKey(index, Number(word.dataset.token));
  };
  box.addEventListener("pointerover", (event) => {
    const focus = event.pointerType === "mouse" && target(event);
    if (focus) point(...focus);
  });
  box.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(null, null));
  box.addEventListener("click", (event) => {
    const focus = target(event);
    if (focus) pin(...focus);
  });
  return flow;
});

// The end of a chunk: after the next end of a sentence or line, if there is one within half a chunk.
function endOfChunk(text, from) {
  const to = Math.min(text.length, from + CHUNK);
  for (let n = to; n < Math.min(text.length, to + CHUNK / 2); n++) if (/^[.!?↵]+$/.test(text[n - 1][0])) return n;
  return to;
}

// Token n of a text as [query, key] of the chosen layer: a query if the layer's queries include it, else a key.
export function toQueryOrKey(index, n) {
  const layer = chosenLayer();
  if (layer.queryText !== index) return [null, n];
  const query = n - layer.offset;
  return query < 0 || query >= layer.queries ? [null, n] : [query, null];
}

function isPatch(index, n) {
  return Boolean(data.picture) && index === data.texts.length - 1 && n >= data.picture.first;
}

function makeChunk(flow, number) {
  const chunk = flow.chunks[number];
  if (chunk.words) return;
  chunk.words = chunk.tokens.map((token, m) => {
    const n = chunk.from + m;
    const next = flow.text[n + 1];
    const classes = `word${token[2] ? " marker" : ""}${token[1] ? " joined" : ""}${next?.[1] ? " open" : ""}`;
    const word = make("span", { class: classes, title: `${rawOf(token)}  (token ${n})`, tabindex: "-1" }, token[0]);
    if (token[2]) word.dir = "ltr"; // isolates a marker, which must not decide the direction of the text
    word.dataset.token = n;
    word.hidden = isPatch(flow.index, n); // shown in the picture instead
    if (m && !token[1]) chunk.element.append(" ");
    chunk.element.append(word);
    return word;
  });
}

// Scroll the box of a text to a token.
export function revealToken(index, n) {
  const flow = flows[index];
  if (!flow.box.classList.contains("endless")) return;
  const number = flow.chunks.findLastIndex((chunk) => chunk.from <= n);
  makeChunk(flow, number);
  const word = flow.chunks[number].words[n - flow.chunks[number].from];
  const top = word.getBoundingClientRect().top - flow.box.getBoundingClientRect().top + flow.box.scrollTop;
  reveal(flow.box, top, top + word.offsetHeight);
}

const applied = new WeakMap(); // the current style of each word, so that only changes touch the DOM

function applyStyle(word, classes, t) {
  const now = `${classes.join(" ")} ${t === null ? "" : t.toFixed(3)} ${theme()}`;
  if (applied.get(word) === now) return;
  applied.set(word, now);
  for (const name of ["focused-query", "focused-key", "unknown", "masked"]) word.classList.toggle(name, classes.includes(name));
  word.style.backgroundColor = t === null ? "" : shade(t);
  word.style.color = t === null ? "" : textColorOn(t);
}

// The scale of the attention received, relative to the largest among words, since markers and sinks often receive ten times as much.
export function receivedScale(layer, head) {
  const tokens = keyTokens(layer);
  const sink = (j) => layer.causal && j === 0; // the first token of a causal text is an attention sink
  const largest = max(head.received, (amount, j) => (tokens[j][2] || sink(j) ? 0 : amount)) || max(head.received) || 1e-9;
  return (j) => Math.min(1, head.received[j] / largest);
}

// The style of token n of a text under the current focus: its position on the color scale, or null, and its classes.
export function tokenStyle(layer, head, index, n, scale) {
  const { query, key } = currentFocus();
  const holdsQueries = layer.queryText === index;
  const holdsKeys = layer.keyText === index;
  const classes = [];
  if (holdsQueries && query !== null && n - layer.offset === query) classes.push("focused-query");
  if (holdsKeys && key !== null && n === key) classes.push("focused-key");
  let t = scale ? 0.8 * scale(n) : null;
  let entry = null;
  if (head.cells) entry = null;
  else if (holdsKeys && query !== null) entry = cell(layer, head, query, n);
  else if (holdsQueries && key !== null && query === null && n >= layer.offset) entry = cell(layer, head, n - layer.offset, key);
  if (entry && entry.kind === KNOWN) t = rampPosition(entry.weight);
  else if (entry) classes.push(entry.kind === UNKNOWN ? "unknown" : "masked");
  return { t: t !== null && t < 0.02 ? null : t, classes };
}

// The scale of a text while nothing is focused; null if something is, or if the head has no details.
export function idleScale(layer, head, index) {
  const { query, key } = currentFocus();
  return layer.keyText === index && query === null && key === null && !head.cells ? receivedScale(layer, head) : null;
}

function drawText(flow) {
  const layer = chosenLayer();
  const head = chosenHead();
  const { query, key } = currentFocus();
  const { note, index } = flow;
  const holdsQueries = layer.queryText === index;
  const holdsKeys = layer.keyText === index;
  const scale = idleScale(layer, head, index);
  for (const number of flow.shown) {
    const { words, from } = flow.chunks[number];
    words.forEach((word, m) => {
      const { t, classes } = tokenStyle(layer, head, index, from + m, scale);
      applyStyle(word, classes, t);
    });
  }
  const title = `${layer.label}, head ${state.head}`;
  if (scale) note.textContent = `Shaded by the attention that each token receives in ${title}.`;
  else if (head.cells) note.textContent = "";
  else if (holdsKeys && query !== null) note.textContent = `Shaded by the weights of “${queryTokens(layer)[query][0]}” in ${title}${producedAfter(layer, query)}.`;
  else if (holdsQueries && key !== null) note.textContent = `Shaded by the weights that queries give to “${keyTokens(layer)[key][0]}” in ${title}.`;
  else note.textContent = holdsQueries || holdsKeys ? "" : `Not used by ${title}.`;
}

const producedAfter = (layer, query) => (inputToken(layer, query) === null ? "" : `, produced after “${inputToken(layer, query)}”`);

const drawTexts = () => flows.forEach(drawText);

// What a row omits, as text; null if it omits nothing.
function omittedText(layer, head, i) {
  const listed = head.start[i + 1] - head.start[i];
  if (!head.complete[i]) {
    const others = plural(allowed(layer, i) - listed, "other key");
    const rest = head.rest[i] < 0.0005 ? "less than 0.001" : fixed3(head.rest[i]);
    return `${rest} in ${others}, not recorded`;
  }
  if (!listed) return "it has no keys to attend to";
  return head.rest[i] > 0.02 ? `${fixed3(head.rest[i])} on no key` : null;
}

function largestItems(items, count) {
  return items.filter((item) => item.weight >= 0.0005).sort((a, b) => b.weight - a.weight).slice(0, count);
}

function drawStatus() {
  const layer = chosenLayer();
  const head = chosenHead();
  const queries = queryTokens(layer);
  const keys = keyTokens(layer);
  const { query, key } = currentFocus();
  const quote = (token, kind) => make("b", { class: kind, dir: "auto" }, token[0]);
  const parts = [];
  if (head.cells) {
    const note = data.served ? "Fetching the details of this head." : "This page holds this head in overview only; `regard serve` shows all heads of a saved record.";
    parts.push(make("span", { class: "soft" }, note));
  } else if (query !== null && key !== null) {
    const entry = cell(layer, head, query, key);
    const text = {
      [KNOWN]: fixed3(entry.weight),
      [UNKNOWN]: `not recorded, ${upperBound(entry.weight)}`,
      [MASKED]: "masked",
    }[entry.kind];
    parts.push(quote(queries[query], "query"), " → ", quote(keys[key], "key"), " ", make("span", { class: "figure" }, text));
  } else if (query !== null) {
    const items = [];
    for (let n = head.start[query]; n < head.start[query + 1]; n++) items.push({ at: head.key[n], weight: head.weight[n] });
    parts.push(quote(queries[query], "query"), " attends to ");
    largestItems(items, 5).forEach((item, n) => {
      parts.push(n ? " · " : "", quote(keys[item.at], "key"), " ", make("span", { class: "figure" }, fixed3(item.weight)));
    });
    const most = Math.log(Math.max(1, reach(layer, head, query))).toFixed(2);
    if (head.entropy) parts.push(make("span", { class: "soft" }, ` · entropy ${head.entropy[query].toFixed(2)} of ${most} nats`));
    const rest = omittedText(layer, head, query);
    if (rest) parts.push(make("span", { class: "rest" }, ` · ${rest}`));
  } else if (key !== null) {
    const items = [];
    let unknown = 0;
    for (let i = 0; i < layer.queries; i++) {
      const { kind, weight } = cell(layer, head, i, key);
      if (kind === KNOWN) items.push({ at: i, weight });
      if (kind === UNKNOWN) unknown++;
    }
    const top = largestItems(items, 5);
    parts.push(quote(keys[key], "key"), top.length ? " is attended by " : " is attended by no recorded query");
    top.forEach((item, n) => {
      parts.push(n ? " · " : "", quote(queries[item.at], "query"), " ", make("span", { class: "figure" }, fixed3(item.weight)));
    });
    const sign = layer.receivedExact ? "" : "at least ";
    parts.push(make("span", { class: "soft" }, ` · received ${sign}${fixed3(head.received[key])} in total`));
    if (unknown) parts.push(make("span", { class: "rest" }, ` · not recorded for ${plural(unknown, "query", "queries")}`));
  } else {
    parts.push(make("span", { class: "soft" }, HINT));
  }
  byId("reading").replaceChildren(make("p", {}, ...parts));
}

// Scroll to a token that was pinned elsewhere.
function showPinnedToken() {
  if (!state.pin) return;
  const layer = chosenLayer();
  if (state.pin.query !== null) revealToken(layer.queryText, state.pin.query + layer.offset);
  else revealToken(layer.keyText, state.pin.key);
}

on("head focus theme", drawTexts);
on("pin", showPinnedToken);
on("head focus", drawStatus);
