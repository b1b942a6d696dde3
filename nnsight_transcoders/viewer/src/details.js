// What is known about a feature: logits it favours, tokens that switch it on, examples.
import { el } from "./dom.js";
import { number, signed, tokenText } from "./text.js";

const LISTS = [
  ["top_logits", "Promotes"],
  ["bottom_logits", "Suppresses"],
  ["de_embedding", "Tokens that switch it on"],
];

const MOST_ROWS = 10;
const FIRST_EXAMPLES = 5;

export function featureDetails(details) {
  const lists = LISTS.filter(([key]) => isPairs(details[key]));
  const examples = Array.isArray(details.examples) ? details.examples.filter(isExample) : [];
  if (!lists.length && !examples.length) return null;
  return el(
    "section",
    { class: "details" },
    el("div", { class: "pair-lists" }, lists.map(([key, title]) => pairList(title, details[key]))),
    examples.length ? exampleList(examples) : null,
  );
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

function exampleList(examples) {
  const rows = el("ol", { class: "examples" });
  const more = el("button", { type: "button", class: "more" }, `Show ${examples.length - FIRST_EXAMPLES} more`);
  more.hidden = examples.length <= FIRST_EXAMPLES;
  const most = Math.max(1e-12, ...examples.flatMap((example) => example.activations.filter(Number.isFinite)));
  const add = (list) => rows.append(...list.map((example) => exampleRow(example, most)));
  add(examples.slice(0, FIRST_EXAMPLES));
  more.addEventListener("click", () => {
    add(examples.slice(FIRST_EXAMPLES));
    more.hidden = true;
  });
  return el("div", {}, el("h3", {}, "Examples"), rows, more);
}

/** Tokens shaded by activation; the shade's strength is a custom property that the style uses. */
function exampleRow({ tokens, activations }, most) {
  return el(
    "li",
    {},
    tokens.map((token, at) => {
      const value = Number.isFinite(activations[at]) ? activations[at] : 0;
      if (value <= 0) return el("span", {}, tokenText(token));
      const strength = `${Math.round(10 + 60 * Math.min(1, value / most))}%`;
      return el(
        "span",
        { class: "lit", title: `activation ${number(value)}`, style: { "--strength": strength } },
        tokenText(token),
      );
    }),
  );
}
