// The search box: words that all have to fit, hits ringed in the graph and listed below the box.
import { byId, el, mark } from "./dom.js";
import { cut, nodeLine, nodeMeaning, nodePlace, nodeName, number } from "./text.js";

const MOST_LISTED = 12;

/** Text of each node that words are looked for in. */
export function searchTexts(model) {
  return model.id.map((id, i) => {
    const place = model.tokens[model.position[i]] ?? "";
    const meaning = nodeMeaning(model, i);
    return `${model.kind[i]} ${model.label[i]} ${meaning} ${place} ${id}`.toLowerCase();
  });
}

/** Whether one word fits a node: a number, "L8" (layer), "@3" (position), or text. */
function fits(model, texts, word, i) {
  if (/^\d+$/.test(word)) {
    const value = Number(word);
    return (
      ((model.kind[i] === "feature" || model.kind[i] === "logit") && model.index[i] === value) ||
      (!model.isToken[i] && !model.isLogit[i] && model.layer[i] === value) ||
      tokenOf(model, i).includes(word)
    );
  }
  if (/^l\d+$/.test(word)) return model.layer[i] === Number(word.slice(1)) && !model.isLogit[i];
  if (/^@\d+$/.test(word)) return model.position[i] === Number(word.slice(1));
  return texts[i].includes(word);
}

function tokenOf(model, i) {
  return String(model.logitName.get(i) ?? model.tokens[model.position[i]] ?? "").toLowerCase();
}

/** Nodes that fit all words of a query: exact feature numbers first, then by influence. */
export function search(model, view, texts, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  const found = view.nodes.filter((i) => words.every((word) => fits(model, texts, word, i)));
  const exact = (i) => (model.kind[i] === "feature" && words.includes(String(model.index[i])) ? 1 : 0);
  return found.sort((a, b) => exact(b) - exact(a) || view.influence[b] - view.influence[a] || a - b);
}

/** Wires the box; actions has hits(list) and choose(i); current() gives the view. */
export function makeSearch(model, current, actions) {
  const box = byId("search");
  const list = byId("hits");
  const texts = searchTexts(model);
  let found = [];
  let active = -1;

  function refresh() {
    found = search(model, current(), texts, box.value);
    active = -1;
    render();
    actions.hits(found);
  }
  function render() {
    const asked = box.value.trim() !== "";
    list.hidden = !asked || document.activeElement !== box;
    box.setAttribute("aria-expanded", String(!list.hidden));
    box.setAttribute("aria-activedescendant", active < 0 ? "" : `hit-${active}`);
    const rows = found.slice(0, MOST_LISTED).map((i, at) => hitRow(model, i, at, at === active, pick));
    const rest = found.length - MOST_LISTED;
    const note = found.length ? rest > 0 && `and ${rest.toLocaleString("en")} more, ringed in the graph` : "Nothing fits in the shown graph.";
    list.replaceChildren(...rows, ...(note ? [el("li", { class: "quiet", role: "presentation" }, note)] : []));
  }
  function pick(i) {
    actions.choose(i);
    list.hidden = true;
    box.setAttribute("aria-expanded", "false");
    box.blur();
  }
  function clear() {
    box.value = "";
    refresh();
  }
  box.addEventListener("input", refresh);
  box.addEventListener("focus", render);
  box.addEventListener("blur", () => (list.hidden = true));
  box.addEventListener("keydown", (event) => {
    const last = Math.min(found.length, MOST_LISTED) - 1;
    if (event.key === "ArrowDown" && last >= 0) active = active >= last ? 0 : active + 1;
    else if (event.key === "ArrowUp" && last >= 0) active = active <= 0 ? last : active - 1;
    else if (event.key === "Enter" && found.length) return pick(found[Math.max(active, 0)]);
    else return undefined;
    event.preventDefault();
    return render();
  });
  return { clear, refresh: () => box.value && refresh(), asked: () => box.value !== "", focus: () => box.focus() };
}

function hitRow(model, i, at, chosen, pick) {
  const meaning = nodeMeaning(model, i);
  return el(
    "li",
    {
      id: `hit-${at}`,
      role: "option",
      "aria-selected": String(chosen),
      "aria-label": nodeLine(model, i),
      // Before the box loses the focus and the list closes.
      onpointerdown: (event) => {
        event.preventDefault();
        pick(i);
      },
    },
    mark(model.kind[i]),
    el("span", { class: "what" }, cut(meaning || nodeName(model, i), 40)),
    el("span", { class: "where" }, nodePlace(model, i)),
    model.value[i] ? el("span", { class: "weight" }, number(model.value[i])) : null,
  );
}
