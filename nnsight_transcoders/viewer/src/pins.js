// The panel of pinned nodes: the list, groups of them (supernodes), and the graph between groups.
import { el, svg } from "./dom.js";
import { makeUnits, placeUnits, unitEdges } from "./groups.js";
import { nodeButton } from "./panel.js";
import { togglePin } from "./state.js";
import { cut, nodeMeaning, nodeName, signed } from "./text.js";

const WIDTH = 320;
const ROW = 62;
const BOX = 30;
const MOST_DRAWN = 60;

/** Builds the panel; what it changes goes to the store. */
export function pinsPanel(model, view, store, actions) {
  const state = store.get();
  if (!state.pinned.length) {
    return [
      el("h2", {}, "Pinned"),
      el("p", { class: "quiet" }, "Select a node and press Pin (or the key p). Pinned nodes stay ringed in the graph; here they can be put into named groups (supernodes)."),
      fileButtons(actions),
    ];
  }
  const units = makeUnits(model, state);
  return [
    el("h2", {}, "Pinned"),
    units.length > 1 ? diagram(model, view, units, actions) : null,
    ...state.groups.map((group, at) => groupBlock(model, store, group, at, actions)),
    looseBlock(model, store, actions),
    fileButtons(actions),
  ];
}

/** The nodes that are in no group, with a form that makes a group of the ticked ones. */
function looseBlock(model, store, actions) {
  const { pinned, groups } = store.get();
  const grouped = new Set(groups.flatMap((group) => group.ids));
  const loose = pinned.filter((id) => !grouped.has(id));
  if (!loose.length) return null;
  const name = el("input", { type: "text", placeholder: "Name of a new group or one above", "aria-label": "Name of the new group", maxlength: 60 });
  const rows = el("ul", { class: "links" }, loose.map((id) => pinRow(model, store, id, actions, true)));
  const submit = (event) => {
    event.preventDefault();
    const ids = [...rows.querySelectorAll("input:checked")].map((box) => box.value);
    if (!ids.length) return;
    store.update({ groups: withGroup(groups, name.value.trim() || `Group ${groups.length + 1}`, ids) });
  };
  return el(
    "form",
    { class: "group", onsubmit: submit },
    el("h3", {}, "Not grouped"),
    rows,
    el("div", { class: "group-form" }, name, el("button", { type: "submit", class: "plain" }, "Group ticked")),
  );
}

function groupBlock(model, store, group, at, actions) {
  const others = () => store.get().groups.filter((_, i) => i !== at);
  return el(
    "section",
    { class: "group" },
    el(
      "h3",
      {},
      el("span", {}, group.name),
      el("button", { type: "button", class: "small", onclick: () => store.update({ groups: others() }) }, "Ungroup"),
    ),
    el("ul", { class: "links" }, group.ids.map((id) => pinRow(model, store, id, actions, false))),
  );
}

function pinRow(model, store, id, actions, ticks) {
  const i = model.byId.get(id);
  const what = nodeName(model, i);
  return el(
    "li",
    { class: "pin-row" },
    ticks ? el("input", { type: "checkbox", value: id, "aria-label": `Tick ${what}` }) : null,
    nodeButton(model, i, actions),
    el("button", { type: "button", class: "small", "aria-label": `Unpin ${what}`, onclick: () => togglePin(store, id) }, "\u00d7"),
  );
}

function unitName(model, unit) {
  if (unit.group) return unit.name;
  return nodeMeaning(model, unit.nodes[0]) || nodeName(model, unit.nodes[0]);
}

/** The small graph and the table of its edges. */
function diagram(model, view, units, actions) {
  const edges = unitEdges(view, units).slice(0, MOST_DRAWN);
  const { places, height } = placeUnits(model, units, WIDTH, ROW);
  const most = edges.length ? Math.abs(edges[0].weight) : 1;
  const names = units.map((unit) => unitName(model, unit));
  const picture = svg(
    "svg",
    { class: "units", viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": "Edges between pinned nodes and groups; the list below has the numbers" },
    [...edges].reverse().map((edge) => unitLine(edge, places, Math.abs(edge.weight) / most)),
    units.map((unit, u) => unitBox(unit, names[u], places[u], actions)),
  );
  const rows = edges.map(({ from, to, weight }) =>
    el(
      "li",
      { class: "flow" },
      el("span", { class: "what" }, `${cut(names[from], 22)} \u2192 ${cut(names[to], 22)}`),
      el("span", { class: `weight ${weight < 0 ? "negative" : "positive"}` }, signed(weight)),
    ),
  );
  const empty = el("p", { class: "quiet" }, "No edge of the shown graph joins them directly.");
  return el("section", {}, picture, rows.length ? el("ul", { class: "flows" }, rows) : empty);
}

function unitLine({ from, to, weight }, places, size) {
  const a = places[from];
  const b = places[to];
  const up = b.y < a.y ? -1 : 1;
  const [y0, y1] = a.y === b.y ? [a.y, b.y] : [a.y + (up * BOX) / 2, b.y - (up * BOX) / 2];
  const middle = (y0 + y1) / 2;
  return svg(
    "path",
    {
      class: weight < 0 ? "flow-line negative" : "flow-line positive",
      d: `M${a.x},${y0}C${a.x},${middle} ${b.x},${middle} ${b.x},${y1}`,
      "stroke-width": 1 + 5 * size,
      "stroke-opacity": 0.3 + 0.6 * size,
    },
  );
}

function unitBox(unit, name, place, actions) {
  const limit = Math.max(3, Math.floor(place.width / 7) - 1);
  return svg(
    "g",
    {
      class: unit.group ? "unit grouped" : "unit",
      transform: `translate(${place.x},${place.y})`,
      onclick: () => actions.choose(unit.nodes[0], "pins"),
      onpointerenter: () => actions.hover(unit.nodes[0]),
      onpointerleave: () => actions.hover(null),
    },
    svg("title", {}, unit.group ? `${name} (${unit.nodes.length})` : name),
    svg("rect", { x: -place.width / 2, y: -BOX / 2, width: place.width, height: BOX, rx: unit.group ? 9 : 4 }),
    svg("text", { "text-anchor": "middle", dy: "0.34em" }, cut(unit.group ? `${name} (${unit.nodes.length})` : name, limit)),
  );
}

/** The groups with some nodes in the group of a name, which may be there already. */
function withGroup(groups, name, ids) {
  const there = groups.some((group) => group.name === name);
  if (!there) return [...groups, { name, ids }];
  return groups.map((group) => (group.name === name ? { name, ids: [...group.ids, ...ids] } : group));
}

/** Saves the state as a file and reads it back. */
function fileButtons(actions) {
  const refused = el("p", { class: "warn", role: "alert" }, "This file holds no saved state.");
  refused.hidden = true;
  const input = el("input", { type: "file", id: "open-file", accept: ".json,application/json" });
  input.hidden = true;
  input.addEventListener("change", async () => {
    const [file] = input.files;
    if (file) refused.hidden = actions.open(await file.text());
  });
  const button = (id, text, onclick) => el("button", { type: "button", class: "plain", id, onclick }, text);
  const buttons = [
    button("save-state", "Save as JSON", () => download(actions.saved())),
    button("open-state", "Open JSON", () => input.click()),
  ];
  return el("div", { class: "files" }, buttons, input, refused);
}

function download(saved) {
  const text = JSON.stringify(saved, null, 1);
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  el("a", { href: address, download: "circuit-state.json" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
