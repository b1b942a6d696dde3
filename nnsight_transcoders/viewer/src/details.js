// What is known about a feature: how often it is active, logits it favours, tokens that switch it
// on, examples. The panel of the graph page and the dashboards show the same parts.
import { el } from "./dom.js";
import { histogram } from "./histogram.js";
import { number, percent, runningText, signed, tokenText } from "./text.js";

const LISTS = [
  ["top_logits", "Raises"],
  ["bottom_logits", "Lowers"],
  ["de_embedding", "Tokens that switch it on"],
];

const MOST_ROWS = 10;
const FIRST_EXAMPLES = 5;

/** The panel's section: statistics, lists and the strongest examples; null if nothing is known. */
export function featureDetails(details) {
  const parts = [statistics(details), pairLists(details), exampleList("Examples", details.examples)];
  return parts.some(Boolean) ? el("section", { class: "details" }, parts) : null;
}

/** Density, largest activation and histogram over the text that was collected on. */
export function statistics(details) {
  const { density, max_activation: most } = details;
  if (typeof density !== "number" || typeof most !== "number") return null;
  return el(
    "div",
    { class: "statistics" },
    el("h3", {}, "On the text"),
    el("p", {}, `active at ${share(density)} of positions, at most ${number(most)}`),
    histogram(details.histogram, most),
  );
}

/** A share as per cent, however small. */
export function share(value) {
  return value >= 0.001 || value === 0 ? percent(value) : `${number(100 * value, 2)}%`;
}

/** Logit effects and de-embedding side by side. */
export function pairLists(details) {
  const lists = LISTS.filter(([key]) => isPairs(details[key]));
  if (!lists.length) return null;
  return el("div", { class: "pair-lists" }, lists.map(([key, title]) => pairList(title, details[key])));
}

function isPairs(list) {
  return Array.isArray(list) && list.length > 0 && list.every((pair) => Array.isArray(pair));
}

function isExample(example) {
  return Array.isArray(example?.tokens) && Array.isArray(example?.activations);
}

function pairList(title, pairs) {
  return el(
    "div",
    {},
    el("h3", {}, title),
    el(
      "ul",
      { class: "pairs" },
      pairs.slice(0, MOST_ROWS).map(([text, value]) =>
        el(
          "li",
          {},
          el("span", { class: "token" }, tokenText(text, 24)),
          el("span", { class: "weight" }, typeof value === "number" ? signed(value) : ""),
        ),
      ),
    ),
  );
}

/** Examples under a heading, the first few and the rest on demand; null if there are none. */
export function exampleList(title, list, most = 0) {
  const examples = Array.isArray(list) ? list.filter(isExample) : [];
  if (!examples.length) return null;
  const rows = el("ol", { class: "examples" });
  const more = el("button", { type: "button", class: "more" }, `Show ${examples.length - FIRST_EXAMPLES} more`);
  more.hidden = examples.length <= FIRST_EXAMPLES;
  const strongest = Math.max(1e-12, most, ...examples.flatMap((example) => example.activations.filter(Number.isFinite)));
  const add = (some) => rows.append(...some.map((example) => exampleRow(example, strongest)));
  add(examples.slice(0, FIRST_EXAMPLES));
  more.addEventListener("click", () => {
    add(examples.slice(FIRST_EXAMPLES));
    more.hidden = true;
  });
  return el("div", {}, el("h3", {}, title), rows, more);
}

/** Tokens shaded by activation; the shade's strength is a custom property that the style uses. */
function exampleRow({ tokens, activations, seen }, strongest) {
  const values = tokens.map((_, at) => (Number.isFinite(activations[at]) ? activations[at] : 0));
  return el(
    "li",
    {},
    el("span", { class: "peak" }, number(Math.max(0, ...values))),
    el(
      "span",
      { class: "running" },
      tokens.map((token, at) => {
        const value = values[at];
        if (value <= 0) return el("span", {}, runningText(token));
        const strength = `${Math.round(10 + 60 * Math.min(1, value / strongest))}%`;
        return el(
          "span",
          { class: "lit", title: `activation ${number(value)}`, style: { "--strength": strength } },
          runningText(token),
        );
      }),
    ),
    Number.isInteger(seen) && seen > 1
      ? el("span", { class: "seen", title: `These tokens stand in the text ${seen.toLocaleString("en")} times` }, `×${seen.toLocaleString("en")}`)
      : null,
  );
}
