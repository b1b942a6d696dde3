// The page of feature dashboards: a list of features, and what is known about the chosen one.
import { makeTheme } from "./controls.js";
import { exampleList, pairLists, share } from "./details.js";
import { byId, el } from "./dom.js";
import { factList } from "./facts.js";
import { histogram } from "./histogram.js";
import { makeStore } from "./state.js";
import { cut, number, runningText } from "./text.js";

const VERSION = 1;
const MOST_LISTED = 300;

const raw = JSON.parse(byId("feature-data").textContent);
if (raw.version !== VERSION) throw new Error(`page data of version ${raw.version}`);
const features = raw.features;
const nameOf = ({ layer, index }) => `${layer}_${index}`;
const byName = new Map(features.map((feature) => [nameOf(feature), feature]));
const texts = features.map((f) => `${f.layer}_${f.index} l${f.layer} ${f.index} ${f.label ?? ""}`.toLowerCase());
const asked = () => decodeURIComponent(location.hash.replace(/^#/, ""));
const store = makeStore({
  chosen: byName.has(asked()) ? asked() : features.length ? nameOf(features[0]) : null,
  query: "",
  theme: "auto",
});

function choose(name) {
  store.update({ chosen: name });
  try {
    history.replaceState(null, "", `#${name}`);
  } catch {
    // A notebook's frame has no address of its own.
  }
}

/** The features whose number, layer or label fits all words of the query. */
function listed() {
  const words = store.get().query.toLowerCase().split(/\s+/).filter(Boolean);
  const fits = (text, word) => (/^\d+$/.test(word) ? text.split(" ").includes(word) || text.startsWith(`${word}_`) : text.includes(word));
  return features.filter((_, at) => words.every((word) => fits(texts[at], word)));
}

function renderList() {
  const found = listed();
  const { chosen } = store.get();
  const rows = found.slice(0, MOST_LISTED).map((feature) => {
    const name = nameOf(feature);
    return el(
      "li",
      {},
      el(
        "button",
        { type: "button", class: "row", "data-goto": name, "aria-current": name === chosen ? "true" : false, onclick: () => choose(name) },
        el("span", { class: "what" }, feature.label ? cut(runningText(feature.label), 60) : `Feature ${feature.index}`),
        el("span", { class: "where" }, feature.label ? `L${feature.layer} ${feature.index}` : `L${feature.layer}`),
        el("span", { class: "weight" }, share(feature.density)),
      ),
    );
  });
  const rest = found.length - MOST_LISTED;
  const note = !found.length ? "Nothing fits." : rest > 0 ? `and ${rest.toLocaleString("en")} more: search for them` : null;
  byId("list").replaceChildren(...rows, ...(note ? [el("li", { class: "quiet" }, note)] : []));
}

function renderFeature() {
  const feature = byName.get(store.get().chosen);
  const parts = feature ? dashboard(feature) : [el("p", { class: "quiet" }, "No features.")];
  byId("feature").replaceChildren(...parts.filter(Boolean));
  byId("feature").scrollTop = 0;
}

function dashboard(feature) {
  const name = `Feature ${feature.index} of layer ${feature.layer}`;
  const groups = Array.isArray(feature.groups) ? feature.groups : [];
  return [
    el("h2", {}, name),
    feature.label ? el("p", { class: "meaning" }, runningText(feature.label)) : null,
    feature.label ? labelFacts(feature) : null,
    el("div", { class: "columns" }, facts(feature), histogram(feature.histogram, feature.max_activation)),
    pairLists(feature),
    el(
      "section",
      {},
      groups.map((group, at) => {
        const title = at === 0 ? "Largest activations" : `Activation ${group.name}`;
        return exampleList(title, group.examples, feature.max_activation);
      }),
      groups.length ? null : el("p", { class: "quiet" }, "Never active on the text."),
    ),
    coactive(feature),
  ];
}

function labelFacts({ label_source: source, label_scores: scores }) {
  const found = Object.entries(scores ?? {}).map(([name, value]) => `${runningText(name)} ${value.toFixed(2)}`);
  const words = [source ? `by ${runningText(source)}` : null, ...found].filter(Boolean);
  return words.length ? el("p", { class: "quiet" }, words.join(", ")) : null;
}

function facts(feature) {
  return factList([
    ["active at", `${feature.n_active.toLocaleString("en")} positions`],
    ["density", share(feature.density)],
    ["largest activation", number(feature.max_activation)],
    ["mean where active", number(feature.mean_activation)],
  ]);
}

/** Features that are active at the same positions; those on this page can be gone to. */
function coactive({ coactive: list }) {
  if (!Array.isArray(list) || !list.length) return null;
  const rows = list.map((other) => {
    const name = nameOf(other);
    const known = byName.get(name);
    const text = known?.label ? cut(runningText(known.label), 40) : `Feature ${other.index}`;
    const inside = [
      el("span", { class: "what" }, text),
      el("span", { class: "where" }, `L${other.layer}`),
      el("span", { class: "weight" }, other.overlap.toFixed(2)),
    ];
    const row = known
      ? el("button", { type: "button", class: "row", "data-goto": name, onclick: () => choose(name) }, inside)
      : el("div", { class: "row still" }, inside);
    return el("li", {}, row);
  });
  const hint = "Share of the positions where either is active at which both are";
  return el("div", {}, el("h3", { title: hint }, "Active with"), el("ul", { class: "links" }, rows));
}

function listen() {
  const box = byId("search");
  box.addEventListener("input", () => store.update({ query: box.value }));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") {
      box.value = "";
      store.update({ query: "" });
      document.activeElement?.blur?.();
    } else if (event.key === "/" && event.target !== box) {
      event.preventDefault();
      box.focus();
    } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      step(event.key === "ArrowDown" ? 1 : -1);
    }
  });
  addEventListener("hashchange", () => byName.has(asked()) && store.update({ chosen: asked() }));
}

/** To the next feature of the list, or the one before. */
function step(by) {
  const found = listed();
  const at = found.findIndex((feature) => nameOf(feature) === store.get().chosen);
  const next = found[Math.min(found.length - 1, Math.max(0, at + by))];
  if (!next) return;
  choose(nameOf(next));
  document.querySelector("#list [aria-current]")?.scrollIntoView({ block: "nearest" });
}

byId("title").textContent = runningText(raw.title);
byId("side").hidden = features.length < 2;
store.subscribe((state, before) => {
  if (state.chosen !== before.chosen) renderFeature();
  if (state.chosen !== before.chosen || state.query !== before.query) renderList();
});
makeTheme(store, () => {});
listen();
renderList();
renderFeature();
document.documentElement.dataset.ready = "true";
