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

export function initialState(thresholds) {
  return { ...thresholds, selected: null, pinned: [], groups: [], theme: "auto", tab: "node" };
}

/** The state as a hash; what is as at the start is left out. */
export function toHash(state, thresholds) {
  const out = new URLSearchParams();
  if (state.node !== thresholds.node) out.set("n", String(state.node));
  if (state.edge !== thresholds.edge) out.set("e", String(state.edge));
  if (state.selected) out.set("s", state.selected);
  if (state.pinned.length) out.set("p", state.pinned.join(","));
  for (const group of state.groups) out.append("g", JSON.stringify([group.name, ...group.ids]));
  if (state.theme !== "auto") out.set("theme", state.theme);
  return out.toString();
}

/** Reads a hash; what it does not name, or names wrongly, is as at the start. */
export function fromHash(hash, thresholds, model) {
  const read = new URLSearchParams(hash.replace(/^#/, ""));
  const state = initialState(thresholds);
  state.node = threshold(read.get("n"), thresholds.node);
  state.edge = threshold(read.get("e"), thresholds.edge);
  if (model.byId.has(read.get("s"))) state.selected = read.get("s");
  if (["light", "dark"].includes(read.get("theme"))) state.theme = read.get("theme");
  const listed = (read.get("p") ?? "").split(",").filter((id) => model.byId.has(id));
  state.pinned = [...new Set(listed)];
  const free = new Set(state.pinned);
  for (const text of read.getAll("g")) {
    const group = readGroup(text, free);
    if (group) state.groups.push(group);
  }
  return state;
}

function threshold(text, otherwise) {
  const value = Number(text);
  return text !== null && value > 0 && value <= 1 ? value : otherwise;
}

/** A group of pinned nodes that are in no other group. */
function readGroup(text, free) {
  let parts;
  try {
    parts = JSON.parse(text);
  } catch {
    return null;
  }
  if (!Array.isArray(parts) || typeof parts[0] !== "string") return null;
  const ids = [...new Set(parts.slice(1))].filter((id) => free.has(id));
  ids.forEach((id) => free.delete(id));
  return ids.length ? { name: parts[0], ids } : null;
}

/** Keeps the address in step with the state (a notebook's frame may refuse; then it is not kept). */
export function keepInAddress(store, thresholds, model) {
  store.subscribe((state) => {
    const hash = toHash(state, thresholds);
    if (hash === location.hash.replace(/^#/, "")) return;
    try {
      history.replaceState(null, "", `#${hash}`);
    } catch {
      // The frame has no address of its own.
    }
  });
  addEventListener("hashchange", () => {
    store.update({ ...fromHash(location.hash, thresholds, model), tab: store.get().tab });
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
