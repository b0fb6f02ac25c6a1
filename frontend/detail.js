// The chosen head in words and figures, its tools, and the key to the colours.

import { maxIndex, mean } from "d3-array";
import { data, reach } from "./decode.js";
import { height, shade } from "./colour.js";
import { byId, chooseHead, chosenHead, chosenLayer, keyTokens, make, on, pin, queryTokens, segments, state, tell, three } from "./state.js";

function figures() {
  const layer = chosenLayer();
  const head = chosenHead();
  const told = layer.heads[state.head];
  byId("head-title").textContent = `${layer.label[0].toUpperCase()}${layer.label.slice(1)} · Head ${state.head}`;
  byId("caption").textContent = told.sentence;
  byId("caption").title = layer.name;

  const facts = [];
  if (told.meanEntropy === null) facts.push(["Spread", "not recorded", `at most ${told.room.toFixed(2)} nats`]);
  else {
    const about = Math.exp(told.meanEntropy).toFixed(1);
    facts.push(["Spread", `${told.meanEntropy.toFixed(2)} of ${told.room.toFixed(2)} nats`, `as if over ${about} tokens evenly`]);
  }
  if (told.pair) {
    const [query, key, weight] = told.pair;
    const link = make("button", { type: "button", class: "link" }, `${queryTokens(layer)[query][0]} → ${keyTokens(layer)[key][0]}`);
    link.addEventListener("click", () => pin(query, key));
    facts.push(["Strongest link", link, three(weight)]);
  }
  const best = maxIndex(head.received);
  const sign = layer.receivedExact ? "" : "at least ";
  if (!head.cells) facts.push(["Receives most", keyTokens(layer)[best][0], `${sign}${head.received[best].toFixed(2)} of ${layer.queries} in all`]);
  if (told.distance !== null) facts.push(["Looks away", `${told.distance < 10 ? told.distance : Math.round(told.distance)} tokens`, "on average, over the weight recorded"]);
  const open = [];
  if (head.cells) facts.push(["Held", "in overview", data.served ? "the rest is being fetched" : "this page has no room for the rest"]);
  else head.complete.forEach((complete, i) => complete || open.push(head.rest[i]));
  if (head.cells) open.length = 0;
  else if (open.length) {
    facts.push(["Not recorded", `${three(mean(open))} of a row`, `on average, beyond its ${layer.top} largest of ${layer.keys}`]);
  } else facts.push(["Recorded", "every weight", layer.causal ? "of the keys a query may attend" : `${layer.queries} × ${layer.keys}`]);
  byId("facts").replaceChildren(
    ...facts.map(([name, value, more]) => make("div", {}, make("dt", {}, name), make("dd", {}, make("span", { class: "value" }, value), make("span", { class: "more" }, more)))),
  );
}

function legend() {
  const layer = chosenLayer();
  const head = chosenHead();
  const bar = make("div", { class: "ramp", role: "img", "aria-label": "Colour scale of the weights, from 0 to 1" });
  const stops = Array.from({ length: 17 }, (_, n) => `${shade(n / 16)} ${((100 * n) / 16).toFixed(1)}%`);
  bar.style.backgroundImage = `linear-gradient(to right, ${stops.join(", ")})`;
  const ticks = make("div", { class: "ticks", "aria-hidden": "true" });
  for (const weight of [0, 0.05, 0.25, 0.5, 1]) {
    const tick = make("span", {}, String(weight));
    tick.style.left = `${100 * height(weight)}%`;
    ticks.append(tick);
  }
  const entries = [make("span", {}, "Weight"), make("div", { class: "scale" }, bar, ticks)];
  const swatch = (kind, text) => make("span", { class: "swatch" }, make("i", { class: kind, "aria-hidden": "true" }), text);
  if (head.cells || head.complete.includes(0)) entries.push(swatch("unknown", "not recorded"));
  const barred = Array.from({ length: layer.queries }, (_, i) => reach(layer, head, i)).some((count) => count < layer.keys);
  if (barred) entries.push(swatch("barred", "may not attend"));
  if (keyTokens(layer).some((token) => token[2])) {
    const box = make("input", { type: "checkbox", id: "markers" });
    box.checked = state.markers;
    box.addEventListener("change", () => {
      state.markers = box.checked;
      tell("markers");
    });
    entries.push(make("label", { class: "choice" }, box, "lines to special tokens"));
  }
  byId("legend").replaceChildren(...entries);
}

// The head before or after, through all layers.
function step(by) {
  let layer = state.layer;
  let head = state.head + by;
  if (head < 0) {
    layer = (layer - 1 + data.layers.length) % data.layers.length;
    head = data.layers[layer].heads.length - 1;
  } else if (head >= data.layers[layer].heads.length) {
    layer = (layer + 1) % data.layers.length;
    head = 0;
  }
  chooseHead(layer, head);
}

// Keep the chosen head where it is, and choose another beside it.
byId("compare").addEventListener("click", () => {
  state.beside = state.beside ? null : { layer: state.layer, head: state.head };
  tell("beside");
});
on("beside", () => {
  byId("compare").setAttribute("aria-pressed", state.beside !== null);
  byId("panels").classList.toggle("compared", state.beside !== null);
});

byId("before").addEventListener("click", () => step(-1));
byId("after").addEventListener("click", () => step(1));
segments(
  byId("view"),
  [
    ["lines", "Lines", "Queries on the left, keys on the right"],
    ["matrix", "Matrix", "A row a query, a column a key"],
    ["both", "Both", "Lines and matrix side by side"],
  ],
  () => state.view,
  (value) => (state.view = value),
  "view",
);
on("view", () => {
  for (const name of ["lines", "matrix", "both"]) byId("panels").classList.toggle(name, name === state.view);
});
on("head", figures);
on("head theme", legend);
