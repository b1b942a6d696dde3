// The page's data as typed arrays. No document: a test runs this file under node.

const VERSION = 1;

/** Reads the parsed JSON of page.py: page_data. */
export function readModel(raw) {
  if (raw.version !== VERSION) throw new Error(`page data of version ${raw.version}`);
  const { nodes, edges } = raw;
  const n = nodes.id.length;
  const is = (...kinds) => Uint8Array.from(nodes.kind, (kind) => (kinds.includes(kind) ? 1 : 0));
  const model = {
    raw,
    n,
    nLayers: raw.n_layers,
    tokens: raw.tokens,
    id: nodes.id,
    kind: nodes.kind,
    label: nodes.label,
    layer: nodes.layer,
    position: nodes.position,
    index: nodes.index,
    value: nodes.value,
    total: nodes.total,
    bias: nodes.bias,
    omitted: nodes.omitted,
    probability: nodes.probability,
    influence: nodes.influence,
    source: Uint32Array.from(edges.source),
    target: Uint32Array.from(edges.target),
    weight: Float32Array.from(edges.weight),
    isError: is("error"),
    isToken: is("token"),
    isLogit: is("logit"),
    isKeptAlways: is("logit", "token"),
    byId: new Map(nodes.id.map((id, i) => [id, i])),
  };
  model.logitWeights = logitWeights(model);
  model.logitName = logitNames(model);
  model.details = Array.from(nodes.kind, (kind, i) =>
    kind === "feature" ? ownEntry(raw.feature_details, `${nodes.layer[i]}_${nodes.index[i]}`) : null,
  );
  model.nodeLabel = nodes.id.map((id) => ownEntry(raw.labels, id));
  return model;
}

function ownEntry(table, key) {
  return Object.prototype.hasOwnProperty.call(table, key) ? table[key] : null;
}

/** The logits' probabilities, or equal shares when they have none. */
function logitWeights({ n, isLogit, probability }) {
  const weights = new Float32Array(n);
  let sum = 0;
  let count = 0;
  for (let i = 0; i < n; i++) {
    if (!isLogit[i]) continue;
    sum += weights[i] = probability[i];
    count += 1;
  }
  if (sum === 0) for (let i = 0; i < n; i++) weights[i] = isLogit[i] / Math.max(count, 1);
  return weights;
}

function logitNames({ n, isLogit, raw }) {
  const names = new Map();
  for (let i = 0; i < n; i++) if (isLogit[i]) names.set(i, raw.target_names[names.size]);
  return names;
}

/** Edge numbers grouped by one of their ends: of(node) gives the edges at that node. */
export function adjacency(ends, n) {
  const start = new Uint32Array(n + 1);
  for (let e = 0; e < ends.length; e++) start[ends[e] + 1] += 1;
  for (let i = 0; i < n; i++) start[i + 1] += start[i];
  const next = start.slice(0, n);
  const edges = new Uint32Array(ends.length);
  for (let e = 0; e < ends.length; e++) edges[next[ends[e]]++] = e;
  return { of: (node) => edges.subarray(start[node], start[node + 1]) };
}
