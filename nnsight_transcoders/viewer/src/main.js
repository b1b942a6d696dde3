// Starts the page: reads the data, and connects state, drawing, panel, controls, search and keys.
import { makeControls, makeTheme, showNotice } from "./controls.js";
import { byId, el } from "./dom.js";
import { listenForKeys, neighbour } from "./keyboard.js";
import { readModel } from "./model.js";
import { overviewPanel } from "./overview.js";
import { nodePanel } from "./panel.js";
import { pinsPanel } from "./pins.js";
import { makeSearch } from "./search.js";
import { makeStage } from "./stage.js";
import { fromFile, fromHash, keepInAddress, makeStore, pinsOfGraph, toFile, togglePin } from "./state.js";
import { nodeLine, number, tokenText } from "./text.js";
import { defaultThresholds, makeView } from "./view.js";

const model = readModel(JSON.parse(byId("graph-data").textContent));
const start = { ...defaultThresholds(model.raw), ...pinsOfGraph(model) };
const store = makeStore(fromHash(location.hash, start, model));
let view = makeView(model, store.get().node, store.get().edge);
let hovered = null;
let hits = [];

const numberOf = (id) => (id === null ? null : model.byId.get(id));
const selected = () => numberOf(store.get().selected);

/** Selects a node (null clears); the panel turns to it unless another tab is asked for. */
function choose(i, tab = "node") {
  hovered = null;
  tip(null);
  store.update({ selected: i === null ? null : model.id[i], tab });
  if (i !== null && view.keep[i]) stage.zoom.reveal(i);
}

function hover(i, event) {
  tip(i, event);
  if (i === hovered) return;
  hovered = i;
  paint();
}

function paint() {
  stage.paint({
    focus: hovered ?? selected(),
    selected: selected(),
    hits,
    pinned: store.get().pinned.map(numberOf),
  });
}

/** The small text beside the pointer. */
function tip(i, event) {
  const box = byId("tip");
  box.hidden = i === null || !event || event.pointerType === "touch";
  if (box.hidden) return;
  const influence = `influence ${number(view.influence[i])}`;
  box.replaceChildren(el("strong", {}, nodeLine(model, i)), el("span", {}, `value ${number(model.value[i])}, ${influence}`));
  const left = Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8);
  const below = event.clientY + 16;
  const top = below + box.offsetHeight > innerHeight ? event.clientY - box.offsetHeight - 10 : below;
  box.style.transform = `translate(${Math.max(4, left)}px,${Math.max(4, top)}px)`;
}

const actions = {
  choose,
  hover,
  pin: (i) => togglePin(store, model.id[i]),
  thresholds: (changes) => store.update(changes),
  saved: () => toFile(store.get()),
  open: (text) => {
    const read = fromFile(text, store.get(), model);
    if (read) store.update(read);
    return read !== null;
  },
  hits: (found) => {
    hits = found;
    paint();
  },
};

function renderPanel() {
  const state = store.get();
  const i = selected();
  const panel = byId("panel");
  const hadFocus = panel.contains(document.activeElement);
  const node = () => (i === null ? overviewPanel(model, view, actions) : nodePanel(model, view, i, state.pinned.includes(state.selected), actions));
  const content = state.tab === "pins" ? pinsPanel(model, view, store, actions) : node();
  panel.replaceChildren(...content.filter(Boolean));
  panel.scrollTop = 0;
  if (hadFocus) panel.focus({ preventScroll: true });
  renderTabs(state, i);
}

function renderTabs(state, i) {
  const tab = (name, text) =>
    el(
      "button",
      {
        type: "button",
        role: "tab",
        id: `tab-${name}`,
        "aria-selected": String(state.tab === name),
        "aria-controls": "panel",
        onclick: () => store.update({ tab: name }),
      },
      text,
    );
  byId("tabs").replaceChildren(
    tab("node", i === null ? "Overview" : "Node"),
    tab("pins", state.pinned.length ? `Pinned ${state.pinned.length}` : "Pinned"),
  );
  byId("panel").setAttribute("aria-labelledby", `tab-${state.tab}`);
}

/** An arrow key: from the selected node, or to the most influential one. */
function move(direction) {
  const from = selected();
  if (from !== null && view.keep[from]) {
    const next = neighbour(view.nodes, stage.scene.places, from, direction);
    if (next !== null) choose(next);
    return;
  }
  const best = view.nodes.filter((i) => model.kind[i] === "feature");
  const pool = best.length ? best : view.nodes;
  if (pool.length) choose(pool.reduce((a, b) => (view.influence[b] > view.influence[a] ? b : a)));
}

function clear() {
  if (search.asked()) search.clear();
  else choose(null);
  document.activeElement?.blur?.();
}

const title = model.raw.title;
byId("title").textContent = title === model.tokens.join("") ? tokenText(title) : title;
byId("title").title = byId("title").textContent;
showNotice(model);
const controls = makeControls(model, actions);
const stage = makeStage(model, { hover, choose });
const search = makeSearch(model, () => view, actions);
listenForKeys({
  move,
  clear,
  search: search.focus,
  pin: () => selected() !== null && actions.pin(selected()),
  zoom: stage.zoom.by,
  fit: stage.zoom.reset,
});
const zoomButton = (text, label, onclick) => el("button", { type: "button", "aria-label": label, title: label, onclick }, text);
byId("zoom").append(
  zoomButton("+", "Zoom in", () => stage.zoom.by(1.5)),
  zoomButton("\u2212", "Zoom out", () => stage.zoom.by(1 / 1.5)),
  zoomButton("Fit", "Show everything", stage.zoom.reset),
);

store.subscribe((state, before) => {
  const changed = (...keys) => keys.some((key) => state[key] !== before[key]);
  if (changed("node", "edge")) {
    view = makeView(model, state.node, state.edge);
    hovered = null;
    stage.show(view);
    controls(state, view);
    search.refresh();
  }
  if (changed("node", "edge", "selected", "pinned", "groups", "tab")) renderPanel();
  if (changed("node", "edge", "selected", "pinned")) paint();
});
keepInAddress(store, start, model);

stage.show(view);
controls(store.get(), view);
makeTheme(store, stage.redraw);
renderPanel();
paint();
new ResizeObserver(() => {
  stage.show(view);
  paint();
}).observe(byId("stage"));
document.documentElement.dataset.ready = "true";
