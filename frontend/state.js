// The state of the page, with publish and subscribe. `focus` is what the pointer is over: a query, a key, or both (one cell); `pin`
// stays when the pointer leaves.

import { data, fetchHead, headOf } from "./decode.js";

export const state = {
  layer: data.start[0],
  head: data.start[1],
  focus: null, // {query, key}, either may be null
  pin: null,
  show: "pattern", // in the thumbnails: pattern, received, entropy, distance
  view: matchMedia("(max-width: 760px)").matches ? "lines" : "both",
  markers: true, // draw the lines to special tokens, which often hide all others
  habit: null, // the pattern that is highlighted in the overview
  beside: null, // {layer, head}: another head, shown beside the chosen one
};

const listeners = { head: [], markers: [], pin: [], focus: [], show: [], view: [], habit: [], theme: [], beside: [] };

export const on = (topics, act) => topics.split(" ").forEach((topic) => listeners[topic].push(act));
export const emit = (topic) => listeners[topic].forEach((act) => act());

export const chosenLayer = () => data.layers[state.layer];
export const chosenHead = () => headOf(state.layer, state.head);
export const currentFocus = () => state.focus || { query: null, key: null };

export function chooseHead(layer, head) {
  if (layer === state.layer && head === state.head) return;
  const before = chosenLayer();
  state.layer = layer;
  state.head = head;
  const after = chosenLayer();
  const same = ["queryText", "keyText", "queries", "keys", "offset"].every((name) => before[name] === after[name]);
  if (!same) state.focus = state.pin = null; // positions in one text mean nothing in another
  emit("head");
  emit("focus");
  if (data.served && chosenHead().cells) {
    fetchHead(layer, head).then((fetched) => {
      if (!fetched || state.layer !== layer || state.head !== head) return;
      emit("head");
      emit("focus");
    });
  }
}

export const sameFocus = (a, b) => (a && a.query) === (b && b.query) && (a && a.key) === (b && b.key);

export function point(query, key) {
  const focus = query === null && key === null ? state.pin : { query, key };
  if (sameFocus(focus, state.focus)) return;
  state.focus = focus;
  emit("focus");
}

export function pin(query, key) {
  const next = { query, key };
  state.pin = state.pin && sameFocus(state.pin, next) ? null : next;
  state.focus = state.pin || (query === null && key === null ? null : next);
  emit("focus");
  emit("pin");
}

export function release() {
  state.pin = state.focus = null;
  emit("focus");
}

// The tokens of a layer's queries and keys: [text, continues, marker, raw].
export const queryTokens = (layer) => data.texts[layer.queryText].slice(layer.offset, layer.offset + layer.queries);
export const keyTokens = (layer) => data.texts[layer.keyText];
// The token that a query reads, where it is named by what is produced from it; null elsewhere.
export const inputToken = (layer, query) => (layer.inputText === null ? null : data.texts[layer.inputText][query + layer.offset][0]);
export const rawOf = (token) => (token.length > 3 ? token[3] : token[0]);
