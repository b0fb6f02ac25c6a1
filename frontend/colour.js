// One scale for every weight on the page: a ramp of even lightness steps (OKLCH, blue), shown by the square root of the weight,
// since most weights are small. In the dark theme the ramp runs from dark to light, so that more always stands out more.

import { UNKNOWN } from "./decode.js";

const RAMPS = {
  light: [[0.965, 0.012, 250], [0.83, 0.075, 245], [0.69, 0.125, 250], [0.53, 0.155, 260], [0.38, 0.14, 268], [0.25, 0.1, 275]],
  dark: [[0.245, 0.025, 265], [0.37, 0.085, 268], [0.51, 0.13, 262], [0.66, 0.13, 248], [0.81, 0.09, 225], [0.96, 0.045, 190]],
};

function oklch([l, c, h]) {
  const a = c * Math.cos((h * Math.PI) / 180);
  const b = c * Math.sin((h * Math.PI) / 180);
  const L = (l + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const M = (l - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const S = (l - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * L - 3.3077115913 * M + 0.2309699292 * S,
    -1.2684380046 * L + 2.6097574011 * M - 0.3413193965 * S,
    -0.0041960863 * L - 0.7034186147 * M + 1.707614701 * S,
  ].map((x) => Math.round(255 * (x <= 0.0031308 ? 12.92 * Math.max(0, x) : 1.055 * Math.min(1, x) ** (1 / 2.4) - 0.055)));
}

function table(stops) {
  const out = [];
  for (let n = 0; n < 256; n++) {
    const place = (n / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    const part = place - low;
    out.push(oklch(stops[low].map((x, axis) => x + part * (stops[low + 1][axis] - x))));
  }
  return out;
}

export const tables = { light: table(RAMPS.light), dark: table(RAMPS.dark) };

export const wantsDark = matchMedia("(prefers-color-scheme: dark)");

export function theme() {
  return document.documentElement.dataset.theme || (wantsDark.matches ? "dark" : "light");
}

// The place of a weight on the scale, 0 to 1.
export const height = (weight) => Math.sqrt(Math.min(1, Math.max(0, weight)));

const shadeBytes = (t) => tables[theme()][Math.round(255 * Math.min(1, Math.max(0, t)))];

export const shade = (t) => `rgb(${shadeBytes(t).join(" ")})`;

// The luminance of a colour of bytes, as WCAG has it.
function luminance(bytes) {
  const [r, g, b] = bytes.map((byte) => (byte <= 10 ? byte / 3294 : ((byte / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

// Ink that reads on a shade: black or white, whichever stands out more, which is by 4.58 at least.
export const inkOn = (t) => (luminance(shadeBytes(t)) + 0.05 > Math.sqrt(1.05 * 0.05) ? "#000000" : "#ffffff");

// A colour of the style sheet as it is now; a canvas understands neither var() nor light-dark().
const probe = document.body.appendChild(document.createElement("i"));
probe.hidden = true;
export function cssColour(name) {
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}

// A texture to fill with: strokes aslant for a weight that was not recorded, dots for a key that may not be attended.
export function texture(context, kind, scale) {
  const size = Math.round((kind === UNKNOWN ? 6 : 5) * scale);
  const tile = document.createElement("canvas");
  tile.width = tile.height = size;
  const paint = tile.getContext("2d");
  paint.fillStyle = cssColour(kind === UNKNOWN ? "--unknown" : "--panel");
  paint.fillRect(0, 0, size, size);
  if (kind === UNKNOWN) {
    paint.strokeStyle = cssColour("--unknown-stroke");
    paint.lineWidth = scale;
    paint.beginPath();
    for (const shift of [-size, 0, size]) {
      paint.moveTo(shift - 1, size + 1);
      paint.lineTo(shift + size + 1, -1);
    }
    paint.stroke();
  } else {
    paint.fillStyle = cssColour("--barred-dot");
    const dot = Math.max(1, Math.round(scale));
    paint.fillRect(Math.floor(size / 2), Math.floor(size / 2), dot, dot);
  }
  return context.createPattern(tile, "repeat");
}
