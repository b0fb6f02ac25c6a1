// The text as it is read, shaded by the chosen head, and the sentence at the foot of the page that says the same in numbers.

import { max } from "d3-array";
import { BARRED, KNOWN, UNKNOWN, allowed, cell, data, reach } from "./decode.js";
import { height, inkOn, shade, theme } from "./colour.js";
import { atMost, byId, chosenHead, chosenLayer, keyTokens, make, many, on, pin, point, queryTokens, rawOf, reveal, state, three } from "./state.js";

const CHUNK = 128; // tokens that are made, shown and shaded together, where a text is longer than that, or a few more

const flows = data.texts.map((text, index) => {
  const box = make("p", { class: `flow${text.length > 60 ? " long" : ""}${text.length > 160 ? " endless" : ""}` });
  if (text.length > 160) box.tabIndex = 0; // what scrolls is reached by the keys
  const note = make("span", { class: "flow-note soft" });
  const name = data.texts.length > 1 ? make("span", { class: "flow-name" }, data.names[index]) : null;
  byId("texts").append(make("div", { class: "text" }, name, box, note));
  const flow = { text, box, note, index, chunks: [], shown: new Set() };
  // What is out of sight is not made, and what was made and left sight is not shaded again until it is back.
  const sight = new IntersectionObserver(
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
    if (text.length > CHUNK) sight.observe(element);
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
    return placeOf(index, Number(word.dataset.token));
  };
  box.addEventListener("pointerover", (event) => {
    const found = event.pointerType === "mouse" && target(event);
    if (found) point(...found);
  });
  box.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(null, null));
  box.addEventListener("click", (event) => {
    const found = target(event);
    if (found) pin(...found);
  });
  return flow;
});

// Where a chunk ends: with a sentence or a line, if one ends soon.
function endOfChunk(text, from) {
  const to = Math.min(text.length, from + CHUNK);
  for (let n = to; n < Math.min(text.length, to + CHUNK / 2); n++) if (/^[.!?↵]+$/.test(text[n - 1][0])) return n;
  return to;
}

// What token n of a text is to the chosen layer: a query if it asks, else a key.
export function placeOf(index, n) {
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
    const word = make("span", { class: `word${token[2] ? " marker" : ""}${token[1] ? " joined" : ""}`, title: `${rawOf(token)}  (token ${n})`, tabindex: "-1" }, token[0]);
    word.dataset.token = n;
    word.hidden = isPatch(flow.index, n); // the picture shows it
    if (m && !token[1]) chunk.element.append(" ");
    chunk.element.append(word);
    return word;
  });
}

// Bring a token of a text into the sight of its box.
export function revealToken(index, n) {
  const flow = flows[index];
  if (!flow.box.classList.contains("endless")) return;
  const number = flow.chunks.findLastIndex((chunk) => chunk.from <= n);
  makeChunk(flow, number);
  const word = flow.chunks[number].words[n - flow.chunks[number].from];
  const top = word.getBoundingClientRect().top - flow.box.getBoundingClientRect().top + flow.box.scrollTop;
  reveal(flow.box, top, top + word.offsetHeight);
}

const dressed = new WeakMap(); // what each word wears, so that only words that change are touched

function dress(word, classes, t) {
  const now = `${classes.join(" ")} ${t === null ? "" : t.toFixed(3)} ${theme()}`;
  if (dressed.get(word) === now) return;
  dressed.set(word, now);
  for (const name of ["asking", "answering", "unknown", "barred"]) word.classList.toggle(name, classes.includes(name));
  word.style.backgroundColor = t === null ? "" : shade(t);
  word.style.color = t === null ? "" : inkOn(t);
}

// The part of the scale for attention received: the words' own greatest is full, since markers and sinks take ten times as much.
export function receivedScale(layer, head) {
  const tokens = keyTokens(layer);
  const sink = (j) => layer.causal && j === 0; // the first token, which later ones look at where they look at nothing
  const most = max(head.received, (amount, j) => (tokens[j][2] || sink(j) ? 0 : amount)) || max(head.received) || 1e-9;
  return (j) => Math.min(1, head.received[j] / most);
}

// How token n of a text stands to what is chosen: the part of the scale that it is shaded by, or null, and the classes it wears.
export function standing(layer, head, index, n, scale) {
  const { query, key } = state.focus || { query: null, key: null };
  const asks = layer.queryText === index;
  const answers = layer.keyText === index;
  const classes = [];
  if (asks && query !== null && n - layer.offset === query) classes.push("asking");
  if (answers && key !== null && n === key) classes.push("answering");
  let t = scale ? 0.8 * scale(n) : null;
  let found = null;
  if (head.cells) found = null;
  else if (answers && query !== null) found = cell(layer, head, query, n);
  else if (asks && key !== null && query === null && n >= layer.offset) found = cell(layer, head, n - layer.offset, key);
  if (found && found.kind === KNOWN) t = height(found.weight);
  else if (found) classes.push(found.kind === UNKNOWN ? "unknown" : "barred");
  return { t: t !== null && t < 0.02 ? null : t, classes };
}

// The scale of a text while nothing is pointed at; null where something is, or nothing is known.
export function restingScale(layer, head, index) {
  const { query, key } = state.focus || { query: null, key: null };
  return layer.keyText === index && query === null && key === null && !head.cells ? receivedScale(layer, head) : null;
}

function drawText(flow) {
  const layer = chosenLayer();
  const head = chosenHead();
  const { query, key } = state.focus || { query: null, key: null };
  const { note, index } = flow;
  const asks = layer.queryText === index;
  const answers = layer.keyText === index;
  const scale = restingScale(layer, head, index);
  for (const number of flow.shown) {
    const { words, from } = flow.chunks[number];
    words.forEach((word, m) => {
      const { t, classes } = standing(layer, head, index, from + m, scale);
      dress(word, classes, t);
    });
  }
  const title = `${layer.label}, head ${state.head}`;
  if (scale) note.textContent = `Shaded by the attention each token receives in ${title}.`;
  else if (head.cells) note.textContent = "";
  else if (answers && query !== null) note.textContent = `Shaded by where “${queryTokens(layer)[query][0]}” looks in ${title}.`;
  else if (asks && key !== null) note.textContent = `Shaded by who looks at “${keyTokens(layer)[key][0]}” in ${title}.`;
  else note.textContent = asks || answers ? "" : `Not part of ${title}.`;
}

const drawTexts = () => flows.forEach(drawText);

// What a row leaves out, as a sentence; null where it leaves out nothing.
function restOf(layer, head, i) {
  const listed = head.start[i + 1] - head.start[i];
  if (!head.complete[i]) {
    const others = many(allowed(layer, i) - listed, "other key");
    const rest = head.rest[i] < 0.0005 ? "less than 0.001" : three(head.rest[i]);
    return `${rest} in ${others}, not recorded`;
  }
  if (!listed) return "it may attend to nothing";
  return head.rest[i] > 0.02 ? `${three(head.rest[i])} held by no key` : null;
}

function ranked(found, most) {
  return found.filter((item) => item.weight >= 0.0005).sort((a, b) => b.weight - a.weight).slice(0, most);
}

function sentence() {
  const layer = chosenLayer();
  const head = chosenHead();
  const asks = queryTokens(layer);
  const answers = keyTokens(layer);
  const { query, key } = state.focus || { query: null, key: null };
  const quote = (token, kind) => make("b", { class: kind }, token[0]);
  const parts = [];
  if (head.cells) {
    const how = data.served ? "The rest of this head is on its way." : "The page holds this head in overview alone: regard serve shows all of a record.";
    parts.push(make("span", { class: "soft" }, how));
  } else if (query !== null && key !== null) {
    const found = cell(layer, head, query, key);
    const told = {
      [KNOWN]: three(found.weight),
      [UNKNOWN]: `not recorded, ${atMost(found.weight)}`,
      [BARRED]: "may not attend",
    }[found.kind];
    parts.push(quote(asks[query], "ask"), " → ", quote(answers[key], "answer"), " ", make("span", { class: "figure" }, told));
  } else if (query !== null) {
    const found = [];
    for (let n = head.start[query]; n < head.start[query + 1]; n++) found.push({ at: head.key[n], weight: head.weight[n] });
    parts.push(quote(asks[query], "ask"), " looks at ");
    ranked(found, 5).forEach((item, n) => {
      parts.push(n ? " · " : "", quote(answers[item.at], "answer"), " ", make("span", { class: "figure" }, three(item.weight)));
    });
    const most = Math.log(Math.max(1, reach(layer, head, query))).toFixed(2);
    if (head.entropy) parts.push(make("span", { class: "soft" }, ` · entropy ${head.entropy[query].toFixed(2)} of ${most} nats`));
    const rest = restOf(layer, head, query);
    if (rest) parts.push(make("span", { class: "rest" }, ` · ${rest}`));
  } else if (key !== null) {
    const found = [];
    let unknown = 0;
    for (let i = 0; i < layer.queries; i++) {
      const seen = cell(layer, head, i, key);
      if (seen.kind === KNOWN) found.push({ at: i, weight: seen.weight });
      if (seen.kind === UNKNOWN) unknown++;
    }
    const top = ranked(found, 5);
    parts.push(quote(answers[key], "answer"), top.length ? " is looked at by " : " is looked at by no recorded query");
    top.forEach((item, n) => {
      parts.push(n ? " · " : "", quote(asks[item.at], "ask"), " ", make("span", { class: "figure" }, three(item.weight)));
    });
    const sign = layer.receivedExact ? "" : "at least ";
    parts.push(make("span", { class: "soft" }, ` · received ${sign}${three(head.received[key])} in all`));
    if (unknown) parts.push(make("span", { class: "rest" }, ` · not recorded for ${many(unknown, "query").replace("querys", "queries")}`));
  } else {
    parts.push(make("span", { class: "soft" }, "Point at a token, tap it, or reach it by the arrow keys, to see where it looks. Enter keeps it, Escape lets go."));
  }
  byId("reading").replaceChildren(make("p", {}, ...parts));
}

// What was pinned elsewhere comes into sight here.
function showPinnedToken() {
  if (!state.pin) return;
  const layer = chosenLayer();
  if (state.pin.query !== null) revealToken(layer.queryText, state.pin.query + layer.offset);
  else revealToken(layer.keyText, state.pin.key);
}

on("head focus theme", drawTexts);
on("pin", showPinnedToken);
on("head focus", sentence);
