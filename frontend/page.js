// Starts the page: its title, its theme, the head named in its address, and the first drawing.

import { data } from "./decode.js";
import { theme, wantsDark } from "./colour.js";
import { byId, chooseHead, on, release, state, tell } from "./state.js";
import "./reading.js";
import "./picture.js";
import "./overview.js";
import "./lines.js";
import "./matrix.js";
import "./detail.js";
import "./save.js";
import "./search.js";

byId("title").textContent = data.title || "What the heads look at";
byId("subtitle").textContent = data.subtitle;
byId("subtitle").hidden = !data.subtitle;

// Storage and addresses are refused in some frames; the page does without them then.
function attempt(act) {
  try {
    return act();
  } catch {
    return null;
  }
}

function nameTheme() {
  const dark = theme() === "dark";
  byId("theme").textContent = dark ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", dark ? "Change to the light theme" : "Change to the dark theme");
}

const kept = attempt(() => localStorage.getItem("regard-theme"));
if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
byId("theme").addEventListener("click", () => {
  const next = theme() === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  attempt(() => localStorage.setItem("regard-theme", next));
  tell("theme");
});
wantsDark.addEventListener("change", () => tell("theme"));
on("theme", nameTheme);

// #5.11 opens layer 5 (as it stands in the overview, from 0), head 11.
function fromAddress() {
  const found = /^#(\d+)\.(\d+)$/.exec(location.hash);
  if (!found) return;
  const [layer, head] = [Number(found[1]), Number(found[2])];
  if (data.layers[layer] && data.layers[layer].heads[head]) chooseHead(layer, head);
}
addEventListener("hashchange", fromAddress);
on("head", () => attempt(() => history.replaceState(null, "", `#${state.layer}.${state.head}`)));

addEventListener("keydown", (event) => {
  if (event.key === "Escape") release();
});

// In a notebook's frame, the page says which head is chosen, and is told.
if (parent !== window) {
  on("head", () => parent.postMessage({ regardHead: [state.layer, state.head] }, "*"));
  addEventListener("message", (event) => {
    const [layer, head] = Array.isArray(event.data?.regardHead) ? event.data.regardHead : [];
    if (event.source === parent && data.layers[layer]?.heads[head]) chooseHead(layer, head);
  });
}

fromAddress();
for (const topic of ["theme", "view", "beside", "head", "focus", "show", "habit"]) tell(topic);
document.documentElement.dataset.ready = "";
