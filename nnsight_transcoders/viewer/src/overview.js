// The panel when nothing is selected: the prompt, the predictions, the scores, the record.
import { el } from "./dom.js";
import { factList } from "./facts.js";
import { nodeButton } from "./panel.js";
import { number, percent, tokenText } from "./text.js";

const FEATURES = 12;

export function overviewPanel(model, view, actions) {
  const logits = view.nodes
    .filter((i) => model.isLogit[i])
    .sort((a, b) => model.probability[b] - model.probability[a] || a - b);
  const features = view.nodes
    .filter((i) => model.kind[i] === "feature" && view.influence[i] > 0)
    .sort((a, b) => view.influence[b] - view.influence[a])
    .slice(0, FEATURES);
  const amount = (value, share) => [
    el("span", { class: "weight" }, value),
    el("span", { class: "under neutral", style: { width: `${100 * share}%` }, "aria-hidden": "true" }),
  ];
  const most = features.length ? view.influence[features[0]] : 1;
  const logitValue = (i) => (model.probability[i] > 0 ? percent(model.probability[i]) : number(model.value[i]));
  return [
    el("h2", {}, "Overview"),
    el("p", { class: "prompt" }, model.tokens.map((token) => el("span", {}, tokenText(token)))),
    section("Predictions", logits.map((i) => nodeButton(model, i, actions, amount(logitValue(i), model.probability[i])))),
    section(
      "Most influential features",
      features.map((i) => nodeButton(model, i, actions, amount(number(view.influence[i]), view.influence[i] / most))),
    ),
    el("h3", {}, "Checks"),
    checks(model, view),
    el("h3", {}, "Record"),
    record(model.raw),
    help(),
  ];
}

function section(title, buttons) {
  if (!buttons.length) return null;
  return el("section", {}, el("h3", {}, title), el("ul", { class: "links" }, buttons.map((b) => el("li", {}, b))));
}

function checks(model, view) {
  return factList([
    ["completeness error", model.raw.scores.completeness_error.toExponential(1), "Largest relative difference between a target's total and the sum of its row"],
    ["replacement score", view.replacementScore.toFixed(3), "Share of the influence that comes from tokens and not from error nodes"],
    ["completeness score", view.completenessScore.toFixed(3), "Share of the nodes' inputs that is not from error nodes"],
  ]);
}

/** The graph's metadata as names and values; nested records get dotted names. */
function record({ metadata, pruning }) {
  const pairs = [];
  const walk = (value, name) => {
    if (value !== null && typeof value === "object" && !Array.isArray(value)) {
      for (const [key, inner] of Object.entries(value)) walk(inner, name ? `${name}.${key}` : key);
    } else if (value !== null && value !== undefined) {
      const text = typeof value === "number" && !Number.isInteger(value) ? number(value, 4) : valueText(value);
      pairs.push([tokenText(name), tokenText(text, 300)]);
    }
  };
  walk(metadata, "");
  walk(pruning ?? null, "pruning");
  return factList(pairs);
}

function valueText(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}

function help() {
  const keys = [
    ["arrows", "move to the next node"],
    ["Esc", "clear selection or search"],
    ["/", "search"],
    ["p", "pin the selected node"],
    ["+  \u2212  0", "zoom in, out, fit"],
  ];
  return el(
    "details",
    { class: "help" },
    el("summary", {}, "Keys"),
    el("dl", { class: "facts" }, keys.map(([key, text]) => el("div", {}, el("dt", {}, key), el("dd", {}, text)))),
  );
}
