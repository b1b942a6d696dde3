// The nodes as SVG elements, one per node, that a test or a screen reader finds by their id.
import { select } from "d3-selection";
import { shape, svg } from "./dom.js";
import { nodeLine, percent, tokenText } from "./text.js";

const CHIP_TEXT = 16;
const CHARACTER = 7;

/** Text in a logit's box. */
export function chipText(model, i) {
  const name = tokenText(model.logitName.get(i), CHIP_TEXT);
  return { name, share: model.probability[i] > 0 ? percent(model.probability[i]) : "" };
}

export function chipWidth(model, i) {
  const { name, share } = chipText(model, i);
  return 16 + CHARACTER * (Array.from(name).length + (share ? share.length + 1 : 0));
}

/** Draws and marks nodes in a group element. */
export function makeNodes(group, model) {
  const element = new Array(model.n);
  let marked = [];

  /** Joins the elements to the shown nodes and moves them to their places. */
  function place(view, places) {
    const joined = select(group)
      .selectChildren("[data-id]")
      .data(view.nodes, (i) => i);
    joined.exit().remove();
    joined.enter().append((i) => (element[i] = create(model, i)));
    for (const i of view.nodes) position(element[i], model, places, i);
  }

  /** Marks the ends of drawn edges, the selection, the search's hits and the pins. */
  function paint({ focus, linked, selected, hits, pinned }) {
    for (const i of marked) element[i].setAttribute("class", `node ${model.kind[i]}`);
    const classes = new Map();
    const add = (i, name) => i !== null && classes.set(i, `${classes.get(i) ?? ""} ${name}`);
    for (const [i, sign] of linked) add(i, `linked ${sign}`);
    pinned.forEach((i) => add(i, "pinned"));
    hits.forEach((i) => add(i, "hit"));
    add(focus, "focus");
    add(selected, "selected");
    marked = [...classes.keys()].filter((i) => element[i]?.isConnected);
    for (const i of marked) {
      element[i].setAttribute("class", `node ${model.kind[i]}${classes.get(i)}`);
      element[i].setAttribute("aria-selected", String(i === selected));
    }
    group.classList.toggle("focused", focus !== null);
    group.classList.toggle("searched", focus === null && hits.length > 0);
  }

  return { place, paint, element: (i) => element[i] };
}

function create(model, i) {
  const kind = model.kind[i];
  const common = {
    class: `node ${kind}`,
    id: `node-${i}`,
    role: "option",
    "aria-selected": "false",
    "aria-label": nodeLine(model, i),
    "data-id": model.id[i],
    "data-number": i,
  };
  if (kind !== "logit") return svg("path", common);
  const { name, share } = chipText(model, i);
  const text = svg("text", { "text-anchor": "middle", dy: "0.34em" });
  text.append(svg("tspan", { class: "chip-name" }, name));
  if (share) text.append(svg("tspan", { class: "chip-share", dx: 6 }, share));
  return svg("g", common, svg("rect", { rx: 4 }), text);
}

function position(element, model, places, i) {
  element.setAttribute("transform", `translate(${places.x[i]},${places.y[i]})`);
  const chip = places.chips.get(i);
  if (!chip) {
    element.setAttribute("d", shape(model.kind[i], places.r[i]));
    return;
  }
  const box = element.firstChild;
  box.setAttribute("x", -chip.width / 2);
  box.setAttribute("y", -chip.height / 2);
  box.setAttribute("width", chip.width);
  box.setAttribute("height", chip.height);
}
