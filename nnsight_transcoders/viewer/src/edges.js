// Edges on two canvases: the strongest ones faintly, and those of the node in focus.
import { links } from "./view.js";

/** Edges drawn on each side of the node in focus; the panel lists all of them. */
const FOCUS_EDGES = 80;

/** Links thinner than this share of the thickest are listed but not drawn. */
const FAINTEST = 0.01;

/** Edges to draw for a node: {in, out}, and the nodes at their ends with the sign of the weight. */
export function focusEdges(view, node) {
  const linked = new Map();
  const pick = (direction) => {
    const all = links(view, node, direction);
    const most = all.length ? Math.abs(all[0].weight) : 0;
    const kept = all.slice(0, FOCUS_EDGES).filter((l) => Math.abs(l.weight) >= FAINTEST * most);
    for (const link of kept) linked.set(link.node, link.weight < 0 ? "negative" : "positive");
    return kept.map((link) => ({ ...link, size: Math.abs(link.weight) / most }));
  };
  return { in: pick("in"), out: pick("out"), linked };
}

/** A canvas that redraws itself for a size and a zoom. */
function begin(canvas, plot, transform) {
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(plot.width * ratio);
  canvas.height = Math.round(plot.height * ratio);
  canvas.style.width = `${plot.width}px`;
  canvas.style.height = `${plot.height}px`;
  const context = canvas.getContext("2d");
  const k = ratio * transform.k;
  context.setTransform(k, 0, 0, k, ratio * transform.x, ratio * transform.y);
  context.lineCap = "round";
  return context;
}

function curve(context, places, source, target) {
  const x0 = places.x[source];
  const y0 = places.y[source];
  const x1 = places.x[target];
  const y1 = places.y[target];
  const bend = Math.max(Math.abs(y1 - y0) * 0.45, 6);
  context.beginPath();
  context.moveTo(x0, y0);
  context.bezierCurveTo(x0, y0 - bend, x1, y1 + bend, x1, y1);
  context.stroke();
}

/** The strongest edges of the whole graph, faint; fainter still behind a node in focus. */
export function drawBackground(canvas, plot, transform, view, places, colours) {
  const context = begin(canvas, plot, transform);
  const most = view.strongest.length ? view.edgeScore[view.strongest[0]] : 1;
  for (let at = view.strongest.length - 1; at >= 0; at--) {
    const edge = view.strongest[at];
    const size = Math.sqrt(view.edgeScore[edge] / most);
    context.globalAlpha = 0.07 + 0.4 * size;
    context.lineWidth = (0.5 + 1.9 * size) / Math.sqrt(transform.k);
    context.strokeStyle = view.weight[edge] < 0 ? colours.negative : colours.positive;
    curve(context, places, view.source[edge], view.target[edge]);
  }
}

/** The edges of the node in focus: colour by sign, width by size, weakest below. */
export function drawFocus(canvas, plot, transform, view, places, colours, focus) {
  const context = begin(canvas, plot, transform);
  if (!focus) return;
  const list = [...focus.edges.in, ...focus.edges.out].sort((a, b) => a.size - b.size);
  for (const { edge, weight, size } of list) {
    context.globalAlpha = 0.22 + 0.68 * size;
    context.lineWidth = (0.7 + 4 * size) / Math.sqrt(transform.k);
    context.strokeStyle = weight < 0 ? colours.negative : colours.positive;
    curve(context, places, view.source[edge], view.target[edge]);
  }
}
