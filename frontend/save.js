// Export of the chosen head: a self-contained SVG, which embeds the matrix as an image if it is shown; or a PNG of it.

import { create } from "d3-selection";
import { data } from "./decode.js";
import { cssColor } from "./color.js";
import { byId, make } from "./dom.js";
import { chosenHead, chosenLayer, keyTokens, queryTokens, state } from "./state.js";
import { ROW, focusedCurves, linesView, restingCurves } from "./lines.js";
import { matrices } from "./matrix.js";

const cleanXml = (text) => text.replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f]/g, "\ufffd"); // not allowed in XML
const writeText = (svg, text, x, y) => svg.append("text").attr("x", x).attr("y", y).text(cleanXml(text));

function renderSvg() {
  const layer = chosenLayer();
  const side = 130;
  const gap = 260;
  const top = 64;
  let width = 24;
  let height = top;
  const svg = create("svg").attr("font-family", "system-ui, sans-serif").attr("font-size", 14).attr("fill", cssColor("--ink"));
  svg.append("rect").attr("width", "100%").attr("height", "100%").attr("fill", cssColor("--panel"));
  writeText(svg, `${data.title ? `${data.title} · ` : ""}${layer.label}, head ${state.head}`, 24, 28).attr("font-weight", 600);
  writeText(svg, layer.heads[state.head].sentence, 24, 48).attr("font-size", 12);
  const lines = state.view !== "matrix" && !state.beside && !chosenHead().cells;
  if (lines) {
    const { from, to } = linesView; // the visible rows of a long text
    const curves = svg.append("g").attr("fill", "none").attr("stroke", cssColor("--curve")).attr("transform", `translate(${width + side} ${top - from * ROW}) scale(${gap / 100} 1)`);
    for (const [{ paths }, opacity] of [[restingCurves, state.focus ? 0.12 : 1], [focusedCurves, 1]]) {
      const image = paths.filter((path) => path.getAttribute("d")).map((path) => path.cloneNode());
      curves.append("g").attr("opacity", opacity).node().append(...image);
    }
    curves.selectAll("path").attr("vector-effect", "non-scaling-stroke");
    for (const [tokens, x, anchor] of [[queryTokens(layer), width + side - 8, "end"], [keyTokens(layer), width + side + gap + 8, "start"]]) {
      const visible = tokens.slice(from, to);
      visible.forEach((token, n) => writeText(svg, token[0], x, top + (n + 0.5) * ROW).attr("dominant-baseline", "central").attr("text-anchor", anchor));
      height = Math.max(height, top + ROW * visible.length);
    }
    width += 2 * side + gap + 24;
  }
  if (!lines || state.view === "both") {
    for (const { canvas } of matrices.filter((view) => view.source())) {
      const box = [parseFloat(canvas.style.width), parseFloat(canvas.style.height)];
      svg.append("image").attr("x", width).attr("y", top).attr("width", box[0]).attr("height", box[1]).attr("href", canvas.toDataURL("image/png"));
      width += box[0] + 24;
      height = Math.max(height, top + box[1]);
    }
  }
  height += 24;
  width = Math.max(width, 420);
  svg.attr("width", width).attr("height", height).attr("viewBox", `0 0 ${width} ${height}`);
  return new XMLSerializer().serializeToString(svg.node());
}

function download(extension, href) {
  const link = make("a", { download: `${chosenLayer().label.replace(/\W+/g, "-")}-head-${state.head}.${extension}` });
  link.href = href;
  link.click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
}

byId("save").addEventListener("click", () => download("svg", URL.createObjectURL(new Blob([renderSvg()], { type: "image/svg+xml" }))));

byId("save-png").addEventListener("click", () => {
  const image = new Image();
  image.addEventListener("load", () => {
    const canvas = document.createElement("canvas");
    canvas.width = 2 * image.width;
    canvas.height = 2 * image.height;
    const context = canvas.getContext("2d");
    context.scale(2, 2);
    context.drawImage(image, 0, 0);
    canvas.toBlob((blob) => download("png", URL.createObjectURL(blob)));
  });
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(renderSvg())}`;
});
