// The picture whose patches are the tokens. Patches can be hovered, pinned and shaded like words.

import { data } from "./decode.js";
import { byId, make } from "./dom.js";
import { chosenHead, chosenLayer, on, pin, point } from "./state.js";
import { toQueryOrKey, idleScale, tokenStyle } from "./reading.js";

const pictureText = data.texts.length - 1; // the text of the keys
let patches = null;

function buildPicture() {
  const { source, rows, columns, first } = data.picture;
  const image = make("img", { src: source, alt: `The input picture, ${rows} by ${columns} patches` });
  const overlay = make("div", { class: "patches", role: "group", "aria-label": "Patches of the picture" });
  overlay.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
  patches = Array.from({ length: rows * columns }, (_, n) => {
    const patch = make("div", { class: "patch", title: `row ${Math.floor(n / columns)}, column ${n % columns}  (token ${first + n})` });
    patch.dataset.token = first + n;
    overlay.append(patch);
    return patch;
  });
  const targetOf = (event) => {
    const patch = event.target.closest(".patch");
    return patch && toQueryOrKey(pictureText, Number(patch.dataset.token));
  };
  overlay.addEventListener("pointerover", (event) => {
    const target = event.pointerType === "mouse" && targetOf(event);
    if (target) point(...target);
  });
  overlay.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(null, null));
  overlay.addEventListener("click", (event) => targetOf(event) && pin(...targetOf(event)));
  byId("texts").prepend(make("div", { class: "picture" }, image, overlay));
}

function drawPicture() {
  const layer = chosenLayer();
  const head = chosenHead();
  const scale = idleScale(layer, head, pictureText);
  for (const patch of patches) {
    const { t, classes } = tokenStyle(layer, head, pictureText, Number(patch.dataset.token), scale);
    patch.className = ["patch", ...classes].join(" ");
    // The veil is transparent overlay patches with a large weight.
    patch.style.setProperty("--veil", (0.86 * (1 - Math.min(1, (t || 0) * 1.15))).toFixed(3));
  }
}

if (data.picture) {
  buildPicture();
  on("head focus theme", drawPicture);
}
