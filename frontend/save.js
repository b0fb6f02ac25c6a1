// The drawing of the chosen head as a picture: an SVG that stands alone, with the matrix inside it where it is shown.

import { create } from "d3-selection";
import { data } from "./decode.js";
import { cssColour } from "./colour.js";
import { byId, chosenHead, chosenLayer, keyTokens, make, queryTokens, state } from "./state.js";
import { ROW, hot, linesView, rest } from "./lines.js";
import { matrices } from "./matrix.js";

const clean = (text) => text.replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f]/g, "\ufffd"); // XML has no such letters
const write = (svg, text, x, y) => svg.append("text").attr("x", x).attr("y", y).text(clean(text));

function picture() {
  const layer = chosenLayer();
  const side = 130;
  const gap = 260;
  const top = 64;
  let wide = 24;
  let high = top;
  const svg = create("svg").attr("font-family", "system-ui, sans-serif").attr("font-size", 14).attr("fill", cssColour("--ink"));
  svg.append("rect").attr("width", "100%").attr("height", "100%").attr("fill", cssColour("--panel"));
  write(svg, `${data.title ? `${data.title} · ` : ""}${layer.label}, head ${state.head}`, 24, 28).attr("font-weight", 600);
  write(svg, layer.heads[state.head].sentence, 24, 48).attr("font-size", 12);
  const lines = state.view !== "matrix" && !state.beside && !chosenHead().cells;
  if (lines) {
    const { from, to } = linesView; // of a long text, what is in sight
    const curves = svg.append("g").attr("fill", "none").attr("stroke", cssColour("--curve")).attr("transform", `translate(${wide + side} ${top - from * ROW}) scale(${gap / 100} 1)`);
    for (const [{ paths }, opacity] of [[rest, state.focus ? 0.12 : 1], [hot, 1]]) {
      const drawn = paths.filter((path) => path.getAttribute("d")).map((path) => path.cloneNode());
      curves.append("g").attr("opacity", opacity).node().append(...drawn);
    }
    curves.selectAll("path").attr("vector-effect", "non-scaling-stroke");
    for (const [tokens, x, anchor] of [[queryTokens(layer), wide + side - 8, "end"], [keyTokens(layer), wide + side + gap + 8, "start"]]) {
      const seen = tokens.slice(from, to);
      seen.forEach((token, n) => write(svg, token[0], x, top + (n + 0.5) * ROW).attr("dominant-baseline", "central").attr("text-anchor", anchor));
      high = Math.max(high, top + ROW * seen.length);
    }
    wide += 2 * side + gap + 24;
  }
  if (!lines || state.view === "both") {
    for (const { canvas } of matrices.filter((view) => view.source())) {
      const box = [parseFloat(canvas.style.width), parseFloat(canvas.style.height)];
      svg.append("image").attr("x", wide).attr("y", top).attr("width", box[0]).attr("height", box[1]).attr("href", canvas.toDataURL("image/png"));
      wide += box[0] + 24;
      high = Math.max(high, top + box[1]);
    }
  }
  high += 24;
  wide = Math.max(wide, 420);
  svg.attr("width", wide).attr("height", high).attr("viewBox", `0 0 ${wide} ${high}`);
  return new XMLSerializer().serializeToString(svg.node());
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
