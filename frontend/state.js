// What is chosen, and who wants to know. `focus` is what is pointed at: a query, a key, or both (one cell); `pin` is what stays
// when the pointer leaves.

import { data, fetchHead, headOf } from "./decode.js";

export const state = {
  layer: data.start[0],
  head: data.start[1],
  focus: null, // {query, key}, either may be null
  pin: null,
  show: "pattern", // in the thumbnails: pattern, received, entropy
  view: matchMedia("(max-width: 760px)").matches ? "lines" : "both",
  markers: true, // draw the lines to special tokens, which often hide all others
  habit: null, // the habit picked out in the overview
  beside: null, // {layer, head}: another head, kept beside the chosen one
};

const listeners = { head: [], markers: [], pin: [], focus: [], show: [], view: [], habit: [], theme: [], beside: [] };

export const on = (topics, act) => topics.split(" ").forEach((topic) => listeners[topic].push(act));
export const tell = (topic) => listeners[topic].forEach((act) => act());

export const chosenLayer = () => data.layers[state.layer];
export const chosenHead = () => headOf(state.layer, state.head);

export function chooseHead(layer, head) {
  if (layer === state.layer && head === state.head) return;
  const before = chosenLayer();
  state.layer = layer;
  state.head = head;
  const after = chosenLayer();
  const same = ["queryText", "keyText", "queries", "keys", "offset"].every((name) => before[name] === after[name]);
  if (!same) state.focus = state.pin = null; // its positions mean nothing in another text
  tell("head");
  tell("focus");
  if (data.served && chosenHead().cells) {
    fetchHead(layer, head).then((held) => {
      if (!held || state.layer !== layer || state.head !== head) return;
      tell("head");
      tell("focus");
    });
  }
}

export const sameFocus = (a, b) => (a && a.query) === (b && b.query) && (a && a.key) === (b && b.key);

export function point(query, key) {
  const focus = query === null && key === null ? state.pin : { query, key };
  if (sameFocus(focus, state.focus)) return;
  state.focus = focus;
  tell("focus");
}

export function pin(query, key) {
  const wanted = { query, key };
  state.pin = state.pin && sameFocus(state.pin, wanted) ? null : wanted;
  state.focus = state.pin || (query === null && key === null ? null : wanted);
  tell("focus");
  tell("pin");
}

export function release() {
  state.pin = state.focus = null;
  tell("focus");
}

// The tokens of the chosen layer's queries and keys: [text, continues, marker, raw].
export const queryTokens = (layer) => data.texts[layer.queryText].slice(layer.offset, layer.offset + layer.queries);
export const keyTokens = (layer) => data.texts[layer.keyText];
export const rawOf = (token) => (token.length > 3 ? token[3] : token[0]);

// Elements. Text goes in as text nodes only, so no token can become markup.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const byId = (id) => document.getElementById(id);
export const three = (number) => number.toFixed(3);
export const atMost = (number) => (number < 0.0005 ? "<0.001" : `≤${three(number)}`);
// Scroll a box, and nothing around it, so that a part of it (pixels from its top) is in sight.
export function reveal(box, from, to) {
  if (from >= box.scrollTop && to <= box.scrollTop + box.clientHeight) return;
  box.scrollTop = Math.max(0, (from + to - box.clientHeight) / 2);
}

export const many = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

// A row of options of which one is chosen, as radio buttons are: arrows move, and the choice follows.
export function segments(box, options, read, write, topic) {
  const buttons = options.map(([value, text, hint]) => {
    const button = make("button", { type: "button", role: "radio", title: hint }, text);
    button.addEventListener("click", () => choose(value));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = (options.findIndex((option) => option[0] === value) + step + options.length) % options.length;
      choose(options[next][0]);
      buttons[next].focus();
    });
    box.append(button);
    return button;
  });
  function choose(value) {
    write(value);
    tell(topic);
  }
  const refresh = () =>
    buttons.forEach((button, n) => {
      const chosen = options[n][0] === read();
      button.setAttribute("aria-checked", chosen);
      button.tabIndex = chosen ? 0 : -1;
    });
  on(topic, refresh);
  refresh();
}
