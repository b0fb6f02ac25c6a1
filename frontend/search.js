// Token search, case-insensitive: Enter goes to the next match, Shift+Enter to the previous one.

import { data } from "./decode.js";
import { byId } from "./dom.js";
import { chosenLayer, pin, rawOf, sameFocus, state } from "./state.js";
import { toQueryOrKey, revealToken } from "./reading.js";

const search = { term: "", matches: [], current: -1 };

function find() {
  const term = byId("search-input").value.trim().toLowerCase();
  if (term === search.term) return;
  Object.assign(search, { term, matches: [], current: -1 });
  if (term) {
    data.texts.forEach((text, index) =>
      text.forEach((token, n) => {
        if (token[0].toLowerCase().includes(term) || rawOf(token).toLowerCase().includes(term)) search.matches.push([index, n]);
      }),
    );
  }
  showCount();
}

function showCount() {
  const { term, matches, current } = search;
  byId("search-status").textContent = !term ? "" : !matches.length ? "none" : current < 0 ? `${matches.length} found` : `${current + 1} of ${matches.length}`;
}

function step(by) {
  if (!search.matches.length) return;
  search.current = (search.current + by + search.matches.length) % search.matches.length;
  const [index, n] = search.matches[search.current];
  const target = toQueryOrKey(index, n);
  const layer = chosenLayer();
  revealToken(index, n);
  const isShown = layer.queryText === index || layer.keyText === index;
  if (isShown && !sameFocus(state.pin, { query: target[0], key: target[1] })) pin(...target);
  showCount();
}

byId("search-input").addEventListener("input", find);
byId("search").addEventListener("submit", (event) => {
  event.preventDefault();
  find();
  step(1);
});
byId("search-input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.shiftKey) {
    event.preventDefault();
    find();
    step(search.current < 0 ? 0 : -1);
  }
});

// A slash focuses the search field.
addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.matches("input")) return;
  event.preventDefault();
  byId("search-input").focus();
});
