// The drawing of the chosen head as a picture: an SVG that stands alone, with the matrix inside it where it is shown.

import { data } from "./decode.js";
import { cssColour } from "./colour.js";
import { byId, chosenHead, chosenLayer, keyTokens, make, queryTokens, state } from "./state.js";
import { ROW, hot, linesView, rest } from "./lines.js";
import { matrices } from "./matrix.js";

const escaped = (text) => text.replace(/[<>&"']/g, (c) => `&#${c.charCodeAt(0)};`).replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f]/g, "\ufffd");

function picture() {
  const layer = chosenLayer();
  const asks = queryTokens(layer);
  const answers = keyTokens(layer);
  const parts = [];
  const side = 130;
  const gap = 260;
  const top = 64;
  let wide = 24;
  let high = top;
  const lines = state.view !== "matrix" && !state.beside && !chosenHead().cells;
  if (lines) {
    const stroke = cssColour("--curve");
    const curves = (group, opacity) =>
      group.paths
        .filter((path) => path.getAttribute("d"))
        .map((path) => `<path d="${path.getAttribute("d")}" stroke-opacity="${(path.getAttribute("stroke-opacity") * opacity).toFixed(3)}" stroke-width="${path.getAttribute("stroke-width")}" vector-effect="non-scaling-stroke"/>`)
        .join("");
    parts.push(`<g fill="none" stroke="${stroke}" transform="translate(${wide + side} ${top - linesView.from * ROW}) scale(${gap / 100} 1)">${curves(rest, state.focus ? 0.12 : 1)}${curves(hot, 1)}</g>`);
    const text = (token, n, x, anchor) => `<text x="${x}" y="${top + (n + 0.5) * ROW}" dominant-baseline="central" text-anchor="${anchor}">${escaped(token[0])}</text>`;
    // Of a long text, what is in sight.
    const seen = (tokens) => tokens.map((token, n) => [token, n]).slice(linesView.from, linesView.to);
    seen(asks).forEach(([token, n]) => parts.push(text(token, n - linesView.from, wide + side - 8, "end")));
    seen(answers).forEach(([token, n]) => parts.push(text(token, n - linesView.from, wide + side + gap + 8, "start")));
    wide += 2 * side + gap + 24;
    high = Math.max(high, top + ROW * Math.max(seen(asks).length, seen(answers).length));
  }
  if (!lines || state.view === "both") {
    for (const { canvas } of matrices.filter((view) => view.source())) {
      const box = [parseFloat(canvas.style.width), parseFloat(canvas.style.height)];
      parts.push(`<image x="${wide}" y="${top}" width="${box[0]}" height="${box[1]}" href="${canvas.toDataURL("image/png")}"/>`);
      wide += box[0] + 24;
      high = Math.max(high, top + box[1]);
    }
  }
  high += 24;
  wide = Math.max(wide, 420);
  const title = `${data.title ? `${data.title} · ` : ""}${layer.label}, head ${state.head}`;
  return (
    `<svg xmlns="http://www.w3.org/2000/svg" width="${wide}" height="${high}" viewBox="0 0 ${wide} ${high}" font-family="system-ui, sans-serif" font-size="14" fill="${cssColour("--ink")}">` +
    `<rect width="100%" height="100%" fill="${cssColour("--panel")}"/>` +
    `<text x="24" y="28" font-weight="600">${escaped(title)}</text><text x="24" y="48" font-size="12">${escaped(layer.heads[state.head].sentence)}</text>${parts.join("")}</svg>`
  );
}

function download(ending, href) {
  const link = make("a", { download: `${chosenLayer().label.replace(/\W+/g, "-")}-head-${state.head}.${ending}` });
  link.href = href;
  link.click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
}

byId("save").addEventListener("click", () => download("svg", URL.createObjectURL(new Blob([picture()], { type: "image/svg+xml" }))));

byId("save-png").addEventListener("click", () => {
  const drawn = new Image();
  drawn.addEventListener("load", () => {
    const canvas = document.createElement("canvas");
    canvas.width = 2 * drawn.width;
    canvas.height = 2 * drawn.height;
    const context = canvas.getContext("2d");
    context.scale(2, 2);
    context.drawImage(drawn, 0, 0);
    canvas.toBlob((blob) => download("png", URL.createObjectURL(blob)));
  });
  drawn.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(picture())}`;
});
