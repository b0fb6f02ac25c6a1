// The entry point: sets the title and the theme, chooses the head named in the address, and draws for the first time.

import { data } from "./decode.js";
import { theme, wantsDark } from "./color.js";
import { byId } from "./dom.js";
import { chooseHead, emit, on, release, state } from "./state.js";
import "./reading.js";
import "./picture.js";
import "./overview.js";
import "./lines.js";
import "./matrix.js";
import "./detail.js";
import "./save.js";
import "./search.js";

byId("title").textContent = data.title || "Attention heads";
byId("subtitle").textContent = data.subtitle;
byId("subtitle").hidden = !data.subtitle;

// Storage and history are blocked in some frames; the page works without them.
function attempt(act) {
  try {
    return act();
  } catch {
    return null;
  }
}

function labelThemeButton() {
  const dark = theme() === "dark";
  byId("theme").textContent = dark ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", dark ? "Switch to the light theme" : "Switch to the dark theme");
}

const savedTheme = attempt(() => localStorage.getItem("regard-theme"));
if (savedTheme === "dark" || savedTheme === "light") document.documentElement.dataset.theme = savedTheme;
byId("theme").addEventListener("click", () => {
  const next = theme() === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  attempt(() => localStorage.setItem("regard-theme", next));
  emit("theme");
});
wantsDark.addEventListener("change", () => emit("theme"));
on("theme", labelThemeButton);

// #5.11 opens layer 5 (its index in the overview), head 11.
function chooseFromHash() {
  const match = /^#(\d+)\.(\d+)$/.exec(location.hash);
  if (!match) return;
  const [layer, head] = [Number(match[1]), Number(match[2])];
  if (data.layers[layer] && data.layers[layer].heads[head]) chooseHead(layer, head);
}
addEventListener("hashchange", chooseFromHash);
on("head", () => attempt(() => history.replaceState(null, "", `#${state.layer}.${state.head}`)));

addEventListener("keydown", (event) => {
  if (event.key === "Escape") release();
});

// In the frame of a notebook widget, the chosen head is synchronized by messages.
if (parent !== window) {
  on("head", () => parent.postMessage({ regardHead: [state.layer, state.head] }, "*"));
  addEventListener("message", (event) => {
    const [layer, head] = Array.isArray(event.data?.regardHead) ? event.data.regardHead : [];
    if (event.source === parent && data.layers[layer]?.heads[head]) chooseHead(layer, head);
  });
}

chooseFromHash();
for (const topic of ["theme", "view", "beside", "head", "focus", "show", "habit"]) emit(topic);
document.documentElement.dataset.ready = "";
