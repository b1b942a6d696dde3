// Numbers, tokens and node names as text.

// Control and direction characters, which could hide or reorder what stands beside them.
const INVISIBLE = /[\u0000-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

/** A token as part of a running text: only what cannot be seen is made visible. */
export function runningText(token) {
  return String(token)
    .replace(/\n/g, "\u21b5")
    .replace(/\t/g, "\u21e5")
    .replace(INVISIBLE, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

/** A token by itself, so that its spaces can be seen too. */
export function tokenText(token, limit = Infinity) {
  return cut(runningText(token).replace(/^ +| +$/g, (spaces) => "\u00b7".repeat(spaces.length)), limit);
}

/** Text of at most so many characters. */
export function cut(text, limit) {
  const characters = Array.from(text);
  return characters.length > limit ? `${characters.slice(0, limit - 1).join("")}\u2026` : text;
}

/** Three significant digits, with a real minus. */
export function number(value, digits = 3) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  const decimals = Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
  const tiny = size >= 1e5 || size < 1e-4;
  const plain = tiny ? size.toExponential(digits - 1).replace("e+", "e") : size.toFixed(decimals);
  return value < 0 ? `\u2212${plain}` : plain;
}

/** The same with a plus sign before what is above zero. */
export function signed(value, digits = 3) {
  return value > 0 ? `+${number(value, digits)}` : number(value, digits);
}

export function percent(value) {
  return `${(100 * value).toFixed(value < 0.1 ? 1 : 0)}%`;
}

export function count(value, noun) {
  return `${value.toLocaleString("en")} ${noun}${value === 1 ? "" : "s"}`;
}

/** What a node is, in a few characters: "L8 \u00b7 355", "error L8", the token, the logit's text. */
export function nodeName(model, i) {
  if (model.kind[i] === "feature") return `L${model.layer[i]} \u00b7 ${model.index[i]}`;
  if (model.kind[i] === "error") return `error L${model.layer[i]}`;
  if (model.kind[i] === "logit") return `${tokenText(model.logitName.get(i), 24)}`;
  return tokenText(model.tokens[model.position[i]] ?? "?", 24);
}

/** What a node is said to mean, if someone said so: in this graph, or of the feature. */
export function nodeMeaning(model, i) {
  const label = model.nodeLabel[i] ?? model.details[i]?.label;
  return typeof label === "string" && label ? tokenText(label, 200) : "";
}

/** Where a node is: its position and token. */
export function nodePlace(model, i, limit = 14) {
  const position = model.position[i];
  return `${position} ${tokenText(model.tokens[position] ?? "?", limit)}`;
}

/** One line that says everything in short, for tooltips and screen readers. */
export function nodeLine(model, i) {
  const meaning = nodeMeaning(model, i);
  return meaning ? `${tokenText(model.label[i])}: ${meaning}` : tokenText(model.label[i]);
}
