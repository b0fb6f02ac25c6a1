// The entry point: sets the title and the theme, chooses the head named in the address, and draws for the first time.

import { data } from "./decode.js";
import { theme, wantsDark } from "./color.js";
import { byId, make } from "./dom.js";
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
byId("subtitle").textContent = byId("subtitle").title = data.subtitle;
byId("subtitle").hidden = !data.subtitle;
byId("notes").append(...data.notes.map((note) => make("li", { dir: "auto" }, note)));
byId("notes").hidden = !data.notes.length;
byId("made").textContent = `Made by regard ${data.version}. Weights are stored to 0.00003.`;

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
  byId("theme").textContent = dark ? "☀" : "☾";
  for (const name of ["aria-label", "title"]) byId("theme").setAttribute(name, dark ? "Switch to the light theme" : "Switch to the dark theme");
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

// #5.11 opens layer 5 (its index in the overview), head 11. An address of no head is replaced by that of the chosen one.
function chooseFromHash() {
  const match = /^#(\d+)\.(\d+)$/.exec(location.hash);
  const [layer, head] = match ? [Number(match[1]), Number(match[2])] : [];
  if (data.layers[layer]?.heads[head]) chooseHead(layer, head);
  else writeHash();
}
const writeHash = () => attempt(() => history.replaceState(null, "", `#${state.layer}.${state.head}`));
addEventListener("hashchange", chooseFromHash);
on("head", writeHash);

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
