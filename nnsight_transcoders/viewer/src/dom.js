// Elements from text: nothing here, or in any other file, parses text as HTML.

/** An element with properties and children; strings become text nodes. */
export function el(name, properties = {}, ...children) {
  return fill(document.createElement(name), properties, children);
}

const SVG = "http://www.w3.org/2000/svg";

/** The same for SVG. */
export function svg(name, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, name), properties, children);
}

function fill(element, properties, children) {
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "style") Object.entries(value).forEach(([k, v]) => element.style.setProperty(k, v));
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

export function byId(id) {
  return document.getElementById(id);
}

/** A node's mark, as in the graph. */
export function mark(kind) {
  return svg(
    "svg",
    { class: "mark", viewBox: "-8 -8 16 16", "aria-hidden": "true" },
    svg("path", { class: `node ${kind}`, d: shape(kind, 6) }),
  );
}

/** Path of a node's shape around (0, 0). */
export function shape(kind, r) {
  if (kind === "error") return `M0,${-r * 1.15}L${r * 1.15},0L0,${r * 1.15}L${-r * 1.15},0Z`;
  if (kind === "token") return `M${-r},${-r}H${r}V${r}H${-r}Z`;
  if (kind === "logit") return `M${-r * 1.25},${-r * 0.8}H${r * 1.25}V${r * 0.8}H${-r * 1.25}Z`;
  return `M${-r},0A${r},${r} 0 1 1 ${r},0A${r},${r} 0 1 1 ${-r},0Z`;
}
