// Names and values side by side.
import { el } from "./dom.js";

/** Name, value and perhaps a hint; what is false is left out. */
export function factList(pairs) {
  return el(
    "dl",
    { class: "facts" },
    pairs.filter(Boolean).map(([name, value, hint]) =>
      el("div", { title: hint }, el("dt", {}, name), el("dd", {}, value)),
    ),
  );
}
