// Layer names at the left and the prompt's tokens along the bottom; both follow the zoom.
import { svg } from "./dom.js";
import { tokenText } from "./text.js";

const CHARACTER = 6.6;
const LABEL_LEAST = 12;
const LONGEST = 14;

/**
 * Room the axes take, and the least width of each column: tokens are written level, and widen their
 * columns for it, if that leaves most of the width to the nodes; otherwise they are slanted.
 */
export function gutters(model, width) {
  const widths = model.tokens.map((token) => tokenText(token, LONGEST).length * CHARACTER + 8);
  const level = widths.reduce((sum, value) => sum + value, 0) < 0.7 * (width - 68);
  const slanted = Math.max(...widths, 0) * 0.79 + 18;
  return {
    left: 58,
    right: 10,
    top: 6,
    bottom: level ? 28 : slanted,
    level,
    columnLeast: level ? widths : widths.map(() => 0),
  };
}

/** Bands behind the layers and lines between the columns, in the zoomed group. */
export function drawGrid(group, places) {
  const bands = places.rows.map((row, at) =>
    svg("rect", {
      class: at % 2 ? "band" : "band odd",
      x: 0,
      y: row.y0,
      width: places.width,
      height: row.y1 - row.y0,
    }),
  );
  const lines = places.columns
    .slice(1)
    .map((c) => svg("line", { class: "divide", x1: c.x0, x2: c.x0, y1: 0, y2: places.height }));
  group.replaceChildren(...bands, ...lines);
}

function layerName(layer, nLayers) {
  if (layer < 0) return "tokens";
  return layer === nLayers ? "logits" : `L${layer}`;
}

/** Layer names that are in sight and do not touch one another. */
export function drawLayers(group, model, places, plot, transform, layer) {
  const labels = [];
  let last = Infinity;
  for (const row of places.rows) {
    const y = transform.applyY(row.y);
    const inSight = y > 4 && y < plot.height - 2;
    const chosen = row.layer === layer;
    if (!inSight || (last - y < LABEL_LEAST && !chosen)) continue;
    last = y;
    const name = layerName(row.layer, model.nLayers);
    labels.push(svg("text", { class: chosen ? "axis chosen" : "axis", x: -9, y, dy: "0.33em" }, name));
  }
  group.replaceChildren(...labels);
}

/** Token texts that are in sight and do not touch one another. */
export function drawTokens(group, model, places, plot, transform, position) {
  const { level } = plot;
  const labels = [];
  let last = -Infinity;
  places.columns.forEach((column, p) => {
    const x = transform.applyX(column.x);
    const chosen = p === position;
    if (x < 0 || x > plot.width || (x - last < LABEL_LEAST && !chosen)) return;
    last = x;
    const turn = level ? `translate(${x},17)` : `translate(${x + 3},9) rotate(-52)`;
    labels.push(
      svg(
        "text",
        { class: `axis token-text${level ? " level" : ""}${chosen ? " chosen" : ""}`, transform: turn },
        tokenText(model.tokens[p], LONGEST),
        svg("title", {}, `position ${p}: ${tokenText(model.tokens[p])}`),
      ),
    );
  });
  group.replaceChildren(...labels);
}
