// Find a token: what holds the letters that are sought, in any case of theirs; Enter goes from one to the next.

import { data } from "./decode.js";
import { byId, chosenLayer, pin, rawOf, sameFocus, state } from "./state.js";
import { placeOf, revealToken } from "./reading.js";

const search = { sought: "", places: [], at: -1 };

function find() {
  const sought = byId("sought").value.trim().toLowerCase();
  if (sought === search.sought) return;
  Object.assign(search, { sought, places: [], at: -1 });
  if (sought) {
    data.texts.forEach((text, index) =>
      text.forEach((token, n) => {
        if (token[0].toLowerCase().includes(sought) || rawOf(token).toLowerCase().includes(sought)) search.places.push([index, n]);
      }),
    );
  }
  tellFound();
}

function tellFound() {
  const { sought, places, at } = search;
  byId("found").textContent = !sought ? "" : !places.length ? "none" : at < 0 ? `${places.length} found` : `${at + 1} of ${places.length}`;
}

function goOn(by) {
  if (!search.places.length) return;
  search.at = (search.at + by + search.places.length) % search.places.length;
  const [index, n] = search.places[search.at];
  const place = placeOf(index, n);
  const layer = chosenLayer();
  revealToken(index, n);
  const known = layer.queryText === index || layer.keyText === index;
  if (known && !sameFocus(state.pin, { query: place[0], key: place[1] })) pin(...place);
  tellFound();
}

byId("sought").addEventListener("input", find);
byId("search").addEventListener("submit", (event) => {
  event.preventDefault();
  find();
  goOn(1);
});
byId("sought").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.shiftKey) {
    event.preventDefault();
    find();
    goOn(search.at < 0 ? 0 : -1);
  }
});

// A slash begins a search, as in many readers.
addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.matches("input")) return;
  event.preventDefault();
  byId("sought").focus();
});
