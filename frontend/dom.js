// Helpers for elements. Text is inserted as text nodes only, so no token can become markup.

import { emit, on } from "./state.js";

export const byId = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

// Text of either direction within a sentence, which it does not reorder.
export const bdi = (text) => make("bdi", {}, text);

// Scroll a box, and no ancestor of it, until the range from..to (pixels from its top) is visible.
export function reveal(box, from, to) {
  if (from >= box.scrollTop && to <= box.scrollTop + box.clientHeight) return;
  box.scrollTop = Math.max(0, (from + to - box.clientHeight) / 2);
}

// Fill `box` with a radio group: a segmented control whose arrow keys move the selection. `options` are [value, text, hint]; `read`
// and `write` access the selected value, and `topic` is emitted when it changes.
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
    emit(topic);
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
