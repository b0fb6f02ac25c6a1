// One color scale for every weight on the page: a ramp of even lightness steps (OKLCH, blue), applied to the square root of the
// weight, since most weights are small. In the dark theme the ramp runs from dark to light, so that larger weights always stand out.

import { convertLchToLab, convertOklabToRgb, convertRgbToLrgb, interpolatorLinear } from "culori/fn";
import { UNKNOWN } from "./decode.js";

const RAMPS = {
  light: [[0.965, 0.012, 250], [0.83, 0.075, 245], [0.69, 0.125, 250], [0.53, 0.155, 260], [0.38, 0.14, 268], [0.25, 0.1, 275]],
  dark: [[0.245, 0.025, 265], [0.37, 0.085, 268], [0.51, 0.13, 262], [0.66, 0.13, 248], [0.81, 0.09, 225], [0.96, 0.045, 190]],
};

// Interpolate 256 colors between the stops, as RGB bytes.
function table(stops) {
  const [l, c, h] = [0, 1, 2].map((axis) => interpolatorLinear(stops.map((stop) => stop[axis])));
  return Array.from({ length: 256 }, (_, n) => {
    const t = n / 255;
    const { r, g, b } = convertOklabToRgb(convertLchToLab({ l: l(t), c: c(t), h: h(t) }));
    return [r, g, b].map((part) => Math.round(255 * clamp(part)));
  });
}

const clamp = (t) => Math.min(1, Math.max(0, t));

// A color as a pixel of ImageData (ABGR, 32 bits).
export const pixel = ([r, g, b]) => (255 << 24) | (b << 16) | (g << 8) | r;

const tables = { light: table(RAMPS.light), dark: table(RAMPS.dark) };
const pixels = { light: tables.light.map(pixel), dark: tables.dark.map(pixel) };

// The pixels of the ramp in the current theme.
export const ramp = () => pixels[theme()];

export const wantsDark = matchMedia("(prefers-color-scheme: dark)");

export function theme() {
  return document.documentElement.dataset.theme || (wantsDark.matches ? "dark" : "light");
}

// The position of a weight on the ramp, 0 to 1.
export const rampPosition = (weight) => Math.sqrt(clamp(weight));

const shadeBytes = (t) => tables[theme()][Math.round(255 * clamp(t))];

export const shade = (t) => `rgb(${shadeBytes(t).join(" ")})`;

// The relative luminance of an RGB color, as defined by WCAG.
function luminance([red, green, blue]) {
  const { r, g, b } = convertRgbToLrgb({ r: red / 255, g: green / 255, b: blue / 255 });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

// The text color on a shade: black or white, whichever has the higher contrast, which is at least 4.58.
export const textColorOn = (t) => (luminance(shadeBytes(t)) + 0.05 > Math.sqrt(1.05 * 0.05) ? "#000000" : "#ffffff");

// The current value of a color of the style sheet; a canvas understands neither var() nor light-dark().
const probe = document.body.appendChild(document.createElement("i"));
probe.hidden = true;
export function cssColor(name) {
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}

// A fill pattern: diagonal strokes for a weight that was not recorded, dots for a masked key.
export function texture(context, kind, scale) {
  const size = Math.round((kind === UNKNOWN ? 6 : 5) * scale);
  const tile = document.createElement("canvas");
  tile.width = tile.height = size;
  const paint = tile.getContext("2d");
  paint.fillStyle = cssColor(kind === UNKNOWN ? "--unknown" : "--panel");
  paint.fillRect(0, 0, size, size);
  if (kind === UNKNOWN) {
    paint.strokeStyle = cssColor("--unknown-stroke");
    paint.lineWidth = scale;
    paint.beginPath();
    for (const shift of [-size, 0, size]) {
      paint.moveTo(shift - 1, size + 1);
      paint.lineTo(shift + size + 1, -1);
    }
    paint.stroke();
  } else {
    paint.fillStyle = cssColor("--masked-dot");
    const dot = Math.max(1, Math.round(scale));
    paint.fillRect(Math.floor(size / 2), Math.floor(size / 2), dot, dot);
  }
  return context.createPattern(tile, "repeat");
}
