// The bar above the graph: pruning sliders, counts and scores, legend; and the theme button.
import { byId, el, mark } from "./dom.js";
import { count } from "./text.js";

const KIND_NAMES = [["feature", "feature"], ["error", "error"], ["token", "token"], ["logit", "logit"]];

/** Builds the bar; actions has thresholds({node, edge}). Returns what keeps it up to date. */
export function makeControls(model, actions) {
  const node = slider("node", "Node threshold", "Share of the nodes' influence to keep", (value) =>
    actions.thresholds({ node: value }),
  );
  const edge = slider("edge", "Edge threshold", "Share of the edges' influence to keep", (value) =>
    actions.thresholds({ edge: value }),
  );
  const counts = el("span", { id: "counts", role: "status" });
  const scores = el("span", { id: "scores" });
  byId("legend").append(legend());
  byId("bar").append(
    node.element,
    edge.element,
    el("div", { class: "numbers" }, counts, scores),
  );
  return (state, view) => {
    node.set(state.node);
    edge.set(state.edge);
    const nodes = `${view.nodes.length.toLocaleString("en")} of ${count(model.n, "node")}`;
    const edges = `${view.source.length.toLocaleString("en")} of ${count(model.source.length, "edge")}`;
    counts.textContent = `${nodes}, ${edges}`;
    const [replacement, completeness] = [view.replacementScore, view.completenessScore].map((s) => s.toFixed(3));
    scores.textContent = `replacement ${replacement}, completeness ${completeness}`;
  };
}

function slider(name, label, hint, changed) {
  const input = el("input", { type: "range", id: `${name}-threshold`, min: 0.05, max: 1, step: 0.01 });
  const output = el("output", { for: `${name}-threshold` });
  const element = el("label", { class: "slider", title: hint }, el("span", {}, label), input, output);
  let waiting = false;
  input.addEventListener("input", () => {
    output.textContent = Number(input.value).toFixed(2);
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      changed(Number(input.value));
    });
  });
  const set = (value) => {
    if (Number(input.value) !== value) input.value = value;
    output.textContent = Number(value).toFixed(2);
  };
  return { element, set };
}

function legend() {
  const kinds = KIND_NAMES.map(([kind, name]) => el("li", {}, mark(kind), name));
  // The drawing reads its colours from these swatches, whatever the theme.
  const ink = (name, text) => el("li", {}, el("span", { class: `ink ${name}`, id: `ink-${name}` }), text);
  return el(
    "ul",
    { class: "legend", "aria-label": "Legend" },
    kinds,
    ink("positive", "raises"),
    ink("negative", "lowers"),
  );
}

/** Says what is not shown, if anything. */
export function showNotice(model) {
  const all = model.raw.n_edges;
  const shown = model.source.length;
  if (shown === all) return;
  const notice = byId("notice");
  notice.hidden = false;
  notice.textContent =
    `This page holds the ${count(shown, "edge")} with the largest influence, of ${all.toLocaleString("en")}; ` +
    "what the others carry is counted as omitted.";
}

const THEMES = ["auto", "light", "dark"];

/** The button that goes through auto, light and dark. */
export function makeTheme(store, changed) {
  const button = byId("theme");
  const apply = (theme) => {
    document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
    button.setAttribute("aria-label", `Theme: ${theme}; change it`);
    changed();
  };
  button.addEventListener("click", () => {
    const next = (THEMES.indexOf(store.get().theme) + 1) % THEMES.length;
    store.update({ theme: THEMES[next] });
  });
  store.subscribe((state, before) => state.theme !== before.theme && apply(state.theme));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  apply(store.get().theme);
}
