// The panel of the selected node: facts, balance, inputs and outputs.
import { featureDetails } from "./details.js";
import { el, mark } from "./dom.js";
import { factList } from "./facts.js";
import { nodeMeaning, nodeName, nodePlace, number, percent, signed, tokenText } from "./text.js";
import { links } from "./view.js";

const FIRST_ROWS = 12;
const MORE_ROWS = 100;

/** Builds the panel of a node; actions has choose(i), hover(i) and pin(i). */
export function nodePanel(model, view, i, pinned, actions) {
  const meaning = nodeMeaning(model, i);
  return [
    el(
      "div",
      { class: "head" },
      el("h2", {}, mark(model.kind[i]), el("span", {}, heading(model, i))),
      el(
        "button",
        { type: "button", class: "pin", "aria-pressed": String(pinned), onclick: () => actions.pin(i) },
        pinned ? "Unpin" : "Pin",
      ),
    ),
    meaning ? el("p", { class: "meaning" }, meaning) : null,
    view.keep[i] ? null : el("p", { class: "warn" }, "Pruned away at these thresholds."),
    facts(model, view, i),
    view.keep[i] ? balance(model, view, i) : null,
    view.keep[i] ? linkList("Inputs", model, links(view, i, "in"), actions, !model.isError[i] && !model.isToken[i]) : null,
    view.keep[i] ? linkList("Outputs", model, links(view, i, "out"), actions, !model.isLogit[i]) : null,
    model.details[i] ? featureDetails(model.details[i]) : null,
  ];
}

function heading(model, i) {
  if (model.kind[i] === "feature") return `Feature ${model.index[i]}`;
  if (model.kind[i] === "error") return "Reconstruction error";
  if (model.kind[i] === "token") return `Token ${nodeName(model, i)}`;
  return `Logit ${nodeName(model, i)}`;
}

const VALUE_NAME = { feature: "activation", error: "norm", token: "norm", logit: "logit" };

function facts(model, view, i) {
  const kind = model.kind[i];
  const target = kind === "feature" || kind === "logit";
  return factList([
    (kind === "feature" || kind === "error") && ["layer", String(model.layer[i])],
    ["position", nodePlace(model, i)],
    kind === "token" && ["token id", String(model.index[i])],
    kind === "logit" && model.index[i] >= 0 && ["token id", String(model.index[i])],
    kind === "logit" && model.probability[i] > 0 && ["probability", percent(model.probability[i])],
    [VALUE_NAME[kind], number(model.value[i])],
    target && [
      kind === "feature" ? "pre-activation" : "minus mean logit",
      number(model.total[i]),
      "What the inputs, bias and omitted terms sum to",
    ],
    target && ["bias", signed(model.bias[i]), "Constant terms: biases of decoders, attention, norms, encoder"],
    target && ["omitted", signed(view.omitted[i]), "From sources that are not in the shown graph"],
    ["influence", influenceText(model, view, i), "Share of influence on the logits in the shown graph"],
  ]);
}

function influenceText(model, view, i) {
  if (model.isLogit[i] || !view.keep[i]) return number(view.keep[i] ? view.influence[i] : model.influence[i]);
  const above = view.nodes.filter((j) => view.influence[j] > view.influence[i]).length;
  return `${number(view.influence[i])} (rank ${above + 1})`;
}

/** A bar that shows how inputs, bias and omitted terms make up the total. */
function balance(model, view, i) {
  if (model.isError[i] || model.isToken[i]) return null;
  let inputs = 0;
  for (const edge of view.incoming.of(i)) inputs += view.weight[edge];
  const parts = [["inputs", inputs], ["bias", model.bias[i]], ["omitted", view.omitted[i]]];
  const most = Math.max(1e-12, ...parts.map(([, value]) => Math.abs(value)), Math.abs(model.total[i]));
  const line = ([name, value]) =>
    el(
      "div",
      { class: "balance-line" },
      el("span", { class: "name" }, name),
      splitBar(value / most),
      el("span", { class: "weight" }, signed(value)),
    );
  const sum = line(["= total", model.total[i]]);
  sum.classList.add("sum");
  return el("section", { class: "balance" }, el("h3", {}, "Where it comes from"), parts.map(line), sum);
}

/** A bar from the middle: to the right above zero, to the left below. */
function splitBar(share) {
  const width = `${Math.min(50, 50 * Math.abs(share))}%`;
  return el(
    "span",
    { class: "split", "aria-hidden": "true" },
    el("span", { class: share < 0 ? "fill negative" : "fill positive", style: { width } }),
  );
}

/** A list of links with bars; more rows come on demand. */
export function linkList(title, model, list, actions, expected = true) {
  if (!list.length && !expected) return null;
  const most = list.length ? Math.abs(list[0].weight) : 1;
  const rows = el("ul", { class: "links" });
  const more = el("button", { type: "button", class: "more" });
  let shown = 0;
  const extend = (n) => {
    rows.append(...list.slice(shown, shown + n).map((link) => linkRow(model, link, most, actions)));
    shown = Math.min(list.length, shown + n);
    more.hidden = shown === list.length;
    more.textContent = `Show ${Math.min(MORE_ROWS, list.length - shown)} more of ${list.length - shown}`;
  };
  more.addEventListener("click", () => extend(MORE_ROWS));
  extend(FIRST_ROWS);
  return el(
    "section",
    {},
    el("h3", {}, title, el("span", { class: "count" }, String(list.length))),
    list.length ? rows : el("p", { class: "quiet" }, "None in the shown graph."),
    more,
  );
}

function linkRow(model, { node, weight }, most, actions) {
  const share = Math.abs(weight) / most;
  const sign = weight < 0 ? "negative" : "positive";
  return el(
    "li",
    {},
    nodeButton(model, node, actions, [
      el("span", { class: `weight ${sign}` }, signed(weight)),
      el("span", { class: `under ${sign}`, style: { width: `${100 * share}%` }, "aria-hidden": "true" }),
    ]),
  );
}

/** A row that names a node and selects it. */
export function nodeButton(model, i, actions, extra = []) {
  const meaning = nodeMeaning(model, i);
  const place = model.isToken[i] || model.isLogit[i] ? `at ${model.position[i]}` : nodePlace(model, i);
  return el(
    "button",
    {
      type: "button",
      class: "row",
      title: tokenText(model.label[i]),
      "data-goto": model.id[i],
      onclick: () => actions.choose(i),
      onpointerenter: () => actions.hover(i),
      onpointerleave: () => actions.hover(null),
      onfocus: () => actions.hover(i),
      onblur: () => actions.hover(null),
    },
    mark(model.kind[i]),
    el("span", { class: "what" }, meaning || nodeName(model, i)),
    el("span", { class: "where" }, meaning ? `L${model.layer[i]} ${place}` : place),
    extra,
  );
}
