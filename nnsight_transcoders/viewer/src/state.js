// Selection, thresholds, pins and groups, kept in the URL hash so that a link shows the same.

/** A store: get(), update(changes), subscribe(listener). */
export function makeStore(initial) {
  let state = initial;
  const listeners = [];
  return {
    get: () => state,
    subscribe: (listener) => listeners.push(listener),
    update(changes) {
      const before = state;
      state = { ...state, ...changes };
      for (const listener of listeners) listener(state, before);
    },
  };
}

/** The state a page opens with: start has the thresholds, and what the graph has of pins and groups. */
export function initialState(start) {
  return { selected: null, pinned: [], groups: [], theme: "auto", tab: "node", ...start };
}

/** The state as a hash; what is as at the start is left out. */
export function toHash(state, start) {
  const out = new URLSearchParams();
  if (state.node !== start.node) out.set("n", String(state.node));
  if (state.edge !== start.edge) out.set("e", String(state.edge));
  if (state.selected) out.set("s", state.selected);
  if (pinsText(state) !== pinsText(initialState(start))) {
    out.set("p", state.pinned.join(","));
    for (const group of state.groups) out.append("g", JSON.stringify([group.name, ...group.ids]));
  }
  if (state.theme !== "auto") out.set("theme", state.theme);
  return out.toString();
}

const pinsText = ({ pinned, groups }) => JSON.stringify([pinned, groups]);

/** Reads a hash; what it does not name, or names wrongly, is as at the start. */
export function fromHash(hash, start, model) {
  const read = new URLSearchParams(hash.replace(/^#/, ""));
  const state = initialState(start);
  state.node = threshold(read.get("n"), start.node);
  state.edge = threshold(read.get("e"), start.edge);
  if (model.byId.has(read.get("s"))) state.selected = read.get("s");
  if (["light", "dark"].includes(read.get("theme"))) state.theme = read.get("theme");
  if (read.has("p")) Object.assign(state, readPins(read.get("p").split(","), read.getAll("g").map(parsed), model));
  return state;
}

/** Known pins, and groups of pins that are in no other group. */
function readPins(ids, groups, model) {
  const pinned = [...new Set(ids)].filter((id) => model.byId.has(id));
  const free = new Set(pinned);
  return { pinned, groups: groups.map((group) => readGroup(group, free)).filter(Boolean) };
}

/** Pins and groups that the graph itself has: a grouped node is pinned. */
export function pinsOfGraph(model) {
  const groups = Object.entries(model.raw.supernodes).map(([name, ids]) => [name, ...ids]);
  return readPins([...model.raw.pinned, ...groups.flatMap((group) => group.slice(1))], groups, model);
}

/** What "Save" writes; the first names are those of Neuronpedia's links. */
export function toFile({ pinned, groups, selected, node, edge }) {
  const supernodes = groups.map(({ name, ids }) => [name, ...ids]);
  return { pinnedIds: pinned, supernodes, clickedId: selected, thresholds: { node, edge } };
}

/** Reads what toFile wrote, or Neuronpedia's names alone; null if the text is nothing of the kind. */
export function fromFile(text, before, model) {
  const saved = parsed(text);
  if (!saved || !Array.isArray(saved.pinnedIds)) return null;
  const groups = Array.isArray(saved.supernodes) ? saved.supernodes : [];
  const members = groups.filter(Array.isArray).flatMap((group) => group.slice(1));
  return {
    ...readPins([...saved.pinnedIds, ...members], groups, model),
    selected: model.byId.has(saved.clickedId) ? saved.clickedId : null,
    node: threshold(saved.thresholds?.node ?? null, before.node),
    edge: threshold(saved.thresholds?.edge ?? null, before.edge),
  };
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function threshold(text, otherwise) {
  const value = Number(text);
  return text !== null && value > 0 && value <= 1 ? value : otherwise;
}

/** A group [name, id, ...] of pinned nodes that are in no other group; null if it is none. */
function readGroup(parts, free) {
  if (!Array.isArray(parts) || typeof parts[0] !== "string") return null;
  const ids = [...new Set(parts.slice(1))].filter((id) => free.has(id));
  ids.forEach((id) => free.delete(id));
  return ids.length ? { name: parts[0], ids } : null;
}

/** Keeps the address in step with the state (a notebook's frame may refuse; then it is not kept). */
export function keepInAddress(store, start, model) {
  store.subscribe((state) => {
    const hash = toHash(state, start);
    if (hash === location.hash.replace(/^#/, "")) return;
    try {
      history.replaceState(null, "", `#${hash}`);
    } catch {
      // The frame has no address of its own.
    }
  });
  addEventListener("hashchange", () => {
    store.update({ ...fromHash(location.hash, start, model), tab: store.get().tab });
  });
}

/** Pins a node or takes the pin away (and the node out of its group). */
export function togglePin(store, id) {
  const { pinned, groups } = store.get();
  if (!pinned.includes(id)) return store.update({ pinned: [...pinned, id] });
  return store.update({
    pinned: pinned.filter((other) => other !== id),
    groups: groups
      .map((group) => ({ ...group, ids: group.ids.filter((other) => other !== id) }))
      .filter((group) => group.ids.length),
  });
}
