// The picture that the tokens were cut from: its patches are pointed at, kept and shaded as words are.

import { data } from "./decode.js";
import { byId, chosenHead, chosenLayer, make, on, pin, point } from "./state.js";
import { placeOf, restingScale, standing } from "./reading.js";

const pictureText = data.texts.length - 1; // what is looked at
let patches = null;

function buildPicture() {
  const { source, rows, columns, first } = data.picture;
  const image = make("img", { src: source, alt: `The picture, in ${rows} by ${columns} patches` });
  const over = make("div", { class: "patches", role: "group", "aria-label": "Patches of the picture" });
  over.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
  patches = Array.from({ length: rows * columns }, (_, n) => {
    const patch = make("div", { class: "patch", title: `row ${Math.floor(n / columns)}, column ${n % columns}  (token ${first + n})` });
    patch.dataset.token = first + n;
    over.append(patch);
    return patch;
  });
  const of = (event) => {
    const patch = event.target.closest(".patch");
    return patch && placeOf(pictureText, Number(patch.dataset.token));
  };
  over.addEventListener("pointerover", (event) => {
    const found = event.pointerType === "mouse" && of(event);
    if (found) point(...found);
  });
  over.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(null, null));
  over.addEventListener("click", (event) => of(event) && pin(...of(event)));
  byId("texts").prepend(make("div", { class: "picture" }, image, over));
}

function drawPicture() {
  const layer = chosenLayer();
  const head = chosenHead();
  const scale = restingScale(layer, head, pictureText);
  for (const patch of patches) {
    const { t, classes } = standing(layer, head, pictureText, Number(patch.dataset.token), scale);
    patch.className = ["patch", ...classes].join(" ");
    // What is looked at is seen through; the rest is veiled.
    patch.style.setProperty("--veil", (0.86 * (1 - Math.min(1, (t || 0) * 1.15))).toFixed(3));
  }
}

if (data.picture) {
  buildPicture();
  on("head focus theme", drawPicture);
}
