// The details of the chosen head: its caption and facts, its toolbar, and the legend of the colors.

import { maxIndex, mean } from "d3-array";
import { data, reach } from "./decode.js";
import { rampPosition, shade } from "./color.js";
import { bdi, byId, make, segments } from "./dom.js";
import { fixed3 } from "./format.js";
import { chooseHead, chosenHead, chosenLayer, emit, keyTokens, on, pin, queryTokens, state } from "./state.js";

function drawFacts() {
  const layer = chosenLayer();
  const head = chosenHead();
  const summary = layer.heads[state.head];
  byId("head-title").textContent = `${layer.label[0].toUpperCase()}${layer.label.slice(1)} · Head ${state.head}`;
  byId("caption").textContent = summary.sentence;
  byId("caption").title = layer.name;

  const facts = [];
  if (summary.meanEntropy === null) facts.push(["Spread", "not recorded", `entropy of at most ${summary.room.toFixed(2)} nats`]);
  else {
    const about = Math.exp(summary.meanEntropy).toFixed(1);
    facts.push(["Spread", `like ${about} tokens`, `entropy ${summary.meanEntropy.toFixed(2)} of at most ${summary.room.toFixed(2)} nats`]);
  }
  if (summary.pair) {
    const [query, key, weight] = summary.pair;
    const link = make("button", { type: "button", class: "link" }, bdi(queryTokens(layer)[query][0]), " → ", bdi(keyTokens(layer)[key][0]));
    link.addEventListener("click", () => pin(query, key));
    facts.push(["Strongest link", link, fixed3(weight)]);
  }
  const best = maxIndex(head.received);
  const sign = layer.receivedExact ? "" : "at least ";
  if (!head.cells) facts.push(["Receives most", bdi(keyTokens(layer)[best][0]), `${sign}${((100 * head.received[best]) / layer.queries).toFixed(0)} % of all attention`]);
  if (summary.distance !== null) facts.push(["Average distance", `${summary.distance < 10 ? summary.distance : Math.round(summary.distance)} tokens`, "over the recorded weights"]);
  const rests = [];
  if (head.cells) facts.push(["Data", "overview only", data.served ? "the details are being fetched" : "this page has no room for the details"]);
  else head.complete.forEach((complete, i) => complete || rests.push(head.rest[i]));
  if (head.cells) rests.length = 0;
  else if (rests.length) {
    facts.push(["Not recorded", `${fixed3(mean(rests))} of a row`, `on average, beyond the ${layer.top} largest of ${layer.keys} weights`]);
  } else facts.push(["Recorded", "all weights", layer.causal ? "of the keys that a query may attend" : `${layer.queries} × ${layer.keys}`]);
  byId("facts").replaceChildren(
    ...facts.map(([name, value, more]) => make("div", {}, make("dt", {}, name), make("dd", {}, make("span", { class: "value" }, value), make("span", { class: "more" }, more)))),
  );
}

function drawLegend() {
  const layer = chosenLayer();
  const head = chosenHead();
  const bar = make("div", { class: "ramp", role: "img", "aria-label": "Color scale of the weights, from 0 to 1" });
  const stops = Array.from({ length: 17 }, (_, n) => `${shade(n / 16)} ${((100 * n) / 16).toFixed(1)}%`);
  bar.style.backgroundImage = `linear-gradient(to right, ${stops.join(", ")})`;
  const ticks = make("div", { class: "ticks", "aria-hidden": "true" });
  for (const weight of [0, 0.05, 0.25, 0.5, 1]) {
    const tick = make("span", {}, String(weight));
    tick.style.left = `${100 * rampPosition(weight)}%`;
    ticks.append(tick);
  }
  const entries = [make("span", { title: "Most weights are small, so that shades are proportional to their square roots" }, "Weight (square-root scale)"), make("div", { class: "scale" }, bar, ticks)];
  const swatch = (kind, text) => make("span", { class: "swatch" }, make("i", { class: kind, "aria-hidden": "true" }), text);
  if (head.cells || head.complete.includes(0)) entries.push(swatch("unknown", "not recorded"));
  const masked = Array.from({ length: layer.queries }, (_, i) => reach(layer, head, i)).some((count) => count < layer.keys);
  if (masked) entries.push(swatch("masked", "masked"));
  if (keyTokens(layer).some((token) => token[2])) {
    const box = make("input", { type: "checkbox", id: "markers" });
    box.checked = state.markers;
    box.addEventListener("change", () => {
      state.markers = box.checked;
      emit("markers");
    });
    entries.push(make("label", { class: "choice" }, box, "lines to special tokens"));
  }
  byId("legend").replaceChildren(...entries);
}

// Move to the previous or next head, across layers.
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

// Keep the chosen head, and show the next choice beside it.
byId("compare").addEventListener("click", () => {
  state.beside = state.beside ? null : { layer: state.layer, head: state.head };
  emit("beside");
});
on("head beside", () => {
  byId("compare-hint").hidden = !state.beside || state.beside.layer !== state.layer || state.beside.head !== state.head;
});
on("beside", () => {
  byId("compare").setAttribute("aria-pressed", state.beside !== null);
  byId("panels").classList.toggle("compared", state.beside !== null);
});

byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
segments(
  byId("view"),
  [
    ["lines", "Lines", "Queries on the left, keys on the right"],
    ["matrix", "Matrix", "One row per query, one column per key"],
    ["both", "Both", "Lines and matrix side by side"],
  ],
  () => state.view,
  (value) => (state.view = value),
  "view",
);
on("view", () => {
  for (const name of ["lines", "matrix", "both"]) byId("panels").classList.toggle(name, name === state.view);
});
on("head", drawFacts);
on("head theme", drawLegend);
