// The drawing: a canvas of faint edges, a canvas of the focus' edges, and the nodes above them.
import { select } from "d3-selection";
import { zoom, zoomIdentity } from "d3-zoom";
import { drawGrid, drawLayers, drawTokens, gutters } from "./axes.js";
import { byId, el, svg } from "./dom.js";
import { drawBackground, drawFocus, focusEdges } from "./edges.js";
import { layout } from "./layout.js";
import { chipWidth, makeNodes } from "./nodes.js";

/** How far from a node the pointer may be, in pixels. */
const REACH = 14;

/** Builds the drawing in #stage; returns what the rest of the page calls. */
export function makeStage(model, handlers) {
  const parts = build(byId("stage"));
  const nodes = makeNodes(parts.nodes, model);
  const scene = { view: null, places: null, plot: null, transform: zoomIdentity, focus: null };
  const zoomer = makeZoom(parts, scene, () => moved());

  function moved() {
    const { transform, view, places, plot } = scene;
    parts.world.setAttribute("transform", transform.toString());
    drawBackground(parts.faint, plot, transform, view, places, colours());
    drawAround();
  }

  /** What depends on the node in focus: its edges, and the names of its layer and token. */
  function drawAround() {
    const { transform, view, places, plot, focus } = scene;
    const layer = focus ? model.layer[focus.node] : null;
    const position = focus ? model.position[focus.node] : null;
    drawLayers(parts.layers, model, places, plot, transform, layer);
    drawTokens(parts.tokens, model, places, plot, transform, position);
    drawFocus(parts.strong, plot, transform, view, places, colours(), focus);
  }

  /** Places everything anew: after a change of the shown graph or of the window. */
  function show(view) {
    scene.view = view;
    scene.plot = measure(parts, gutters(model, parts.root.clientWidth));
    scene.places = layout(model, view, scene.plot, (i) => chipWidth(model, i));
    nodes.place(view, scene.places);
    drawGrid(parts.grid, scene.places);
    zoomer.bounds();
    moved();
  }

  /** Marks nodes and draws the edges of the one in focus. */
  function paint({ focus, selected, hits, pinned }) {
    const shown = (i) => i !== null && scene.view.keep[i];
    const edges = shown(focus) ? focusEdges(scene.view, focus) : null;
    scene.focus = edges ? { node: focus, edges } : null;
    nodes.paint({
      focus: edges ? focus : null,
      linked: edges ? edges.linked : new Map(),
      selected: shown(selected) ? selected : null,
      hits: hits.filter(shown),
      pinned: pinned.filter(shown),
    });
    parts.root.classList.toggle("focused", Boolean(edges) || hits.length > 0);
    parts.svg.setAttribute("aria-activedescendant", shown(selected) ? `node-${selected}` : "");
    drawAround();
  }

  listen(parts, scene, handlers);
  return { show, paint, redraw: moved, zoom: zoomer, svg: parts.svg, scene };
}

function build(root) {
  const faint = el("canvas", { class: "faint" });
  const strong = el("canvas", { class: "strong" });
  const grid = svg("g", { class: "grid", "aria-hidden": "true" });
  const nodes = svg("g", { class: "nodes", role: "presentation" });
  const back = svg("svg", { class: "back", "aria-hidden": "true" }, grid);
  const world = svg("g", { role: "presentation" }, nodes);
  const layers = svg("g", { class: "layers", "aria-hidden": "true" });
  const tokens = svg("g", { class: "tokens", "aria-hidden": "true" });
  const clip = svg("rect");
  const floor = svg("rect", { class: "floor" });
  const plot = svg("g", { class: "plot", "clip-path": "url(#plot-clip)", role: "presentation" }, floor, world);
  const front = svg(
    "svg",
    {
      class: "front",
      id: "graph",
      tabindex: 0,
      role: "listbox",
      "aria-label": "Attribution graph. Arrow keys move between nodes, Escape clears.",
    },
    svg("defs", {}, svg("clipPath", { id: "plot-clip" }, clip)),
    plot,
    layers,
    tokens,
  );
  root.append(back, faint, strong, front);
  return { root, faint, strong, grid, nodes, back, world, layers, tokens, plot, rects: [clip, floor], svg: front };
}

/** Fits the layers of the drawing to the element's size and returns the plot's size. */
function measure(parts, room) {
  const width = Math.max(200, parts.root.clientWidth - room.left - room.right);
  const height = Math.max(160, parts.root.clientHeight - room.top - room.bottom);
  for (const part of [parts.back, parts.faint, parts.strong]) {
    part.style.left = `${room.left}px`;
    part.style.top = `${room.top}px`;
  }
  parts.back.style.width = `${width}px`;
  parts.back.style.height = `${height}px`;
  for (const rect of parts.rects) {
    rect.setAttribute("width", width);
    rect.setAttribute("height", height);
  }
  const shift = (x, y) => `translate(${x},${y})`;
  parts.plot.setAttribute("transform", shift(room.left, room.top));
  parts.layers.setAttribute("transform", shift(room.left, room.top));
  parts.tokens.setAttribute("transform", shift(room.left, room.top + height));
  return { ...room, width, height };
}

function makeZoom(parts, scene, moved) {
  const framed = window.self !== window.top;
  const behaviour = zoom()
    // In a notebook's frame the bare wheel scrolls the notebook.
    .filter((event) => !event.button && (event.type !== "wheel" || !framed || event.ctrlKey || event.metaKey))
    .on("zoom", (event) => {
      scene.transform = event.transform;
      parts.grid.setAttribute("transform", event.transform.toString());
      moved();
    });
  const target = select(parts.plot).call(behaviour).on("dblclick.zoom", null);
  const fitting = () => Math.min(1, scene.plot.width / scene.places.width, scene.plot.height / scene.places.height);

  /** Limits panning to the drawing, and shows all of it. */
  function bounds() {
    const { plot, places } = scene;
    const fit = fitting();
    behaviour
      .extent([[0, 0], [plot.width, plot.height]])
      .translateExtent([[0, 0], [Math.max(places.width, plot.width / fit), Math.max(places.height, plot.height / fit)]])
      .scaleExtent([fit, 12]);
    if (scene.transform.k <= fit || scene.transform.k === 1) reset();
  }
  const reset = () => target.call(behaviour.transform, zoomIdentity.scale(fitting()));
  const by = (factor) => target.call(behaviour.scaleBy, factor);

  /** Moves the drawing so that a node is in sight. */
  function reveal(i) {
    const { plot, places, transform } = scene;
    const [x, y] = transform.apply([places.x[i], places.y[i]]);
    if (x >= 0 && y >= 0 && x <= plot.width && y <= plot.height) return;
    target.call(behaviour.translateTo, places.x[i], places.y[i]);
  }
  return { bounds, reset, by, reveal };
}

/** Pointer events: the nearest node within reach counts, so small nodes are easy to hit. */
function listen(parts, scene, { hover, choose }) {
  const at = (event) => {
    const own = event.target.closest?.("[data-id]");
    if (own) return Number(own.dataset.number);
    const box = parts.svg.getBoundingClientRect();
    const x = event.clientX - box.left - scene.plot.left;
    const y = event.clientY - box.top - scene.plot.top;
    return x < 0 || x > scene.plot.width || y > scene.plot.height ? null : nearest(scene, x, y);
  };
  parts.svg.addEventListener("pointermove", (event) => event.buttons || hover(at(event), event));
  parts.svg.addEventListener("pointerleave", (event) => hover(null, event));
  parts.svg.addEventListener("click", (event) => choose(at(event)));
}

export function nearest({ view, places, transform }, px, py) {
  const [x, y] = transform.invert([px, py]);
  let best = null;
  let least = (REACH / transform.k) ** 2;
  for (const i of view.nodes) {
    const distance = (places.x[i] - x) ** 2 + (places.y[i] - y) ** 2;
    if (distance < least) {
      least = distance;
      best = i;
    }
  }
  return best;
}

/** The colours of the current theme, as the canvas wants them. */
function colours() {
  const read = (name) => getComputedStyle(byId(`ink-${name}`)).color;
  return { positive: read("positive"), negative: read("negative") };
}
