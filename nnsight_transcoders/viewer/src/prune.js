// Influence, scores and pruning of edge lists: the same steps, in the same order and in double
// precision, as nnsight_transcoders/circuits/prune.py, so that both find the same nodes and edges.
// No imports and no document: a test runs this file under node.
//
// A graph here is {n, source, target, weight, logitWeights, isError, isKeptAlways, isToken}:
// typed arrays with one entry per edge (source, target, weight) or per node (the rest).

/** Weight sizes divided by the sum over the same target's edges. */
export function normalisedWeights(target, weight, n) {
  const sums = new Float64Array(n);
  for (let e = 0; e < weight.length; e++) sums[target[e]] += Math.abs(weight[e]);
  const share = new Float64Array(weight.length);
  for (let e = 0; e < weight.length; e++) {
    share[e] = Math.abs(weight[e]) / Math.max(sums[target[e]], 1e-300);
  }
  return share;
}

/** Influence of each node on the logits: p (B + B^2 + ...), a finite sum. */
export function influence(source, target, share, logitWeights, n) {
  let reached = Float64Array.from(logitWeights);
  const total = new Float64Array(n);
  for (let round = 0; round <= n; round++) {
    const step = new Float64Array(n);
    for (let e = 0; e < share.length; e++) step[source[e]] += reached[target[e]] * share[e];
    if (step.every((value) => value === 0)) return total;
    for (let i = 0; i < n; i++) total[i] += step[i];
    reached = step;
  }
  throw new Error("the graph's edges have a cycle");
}

/** Scores with the order and the sums that any threshold needs. */
function ranked(scores) {
  // Sorted without a comparison function, which is many times faster.
  const sorted = Float64Array.from(scores).sort();
  const reached = new Float64Array(sorted.length);
  let sum = 0;
  for (let i = 0; i < sorted.length; i++) reached[i] = sum += sorted[sorted.length - 1 - i];
  return { scores, sorted, reached, sum };
}

/** Marks the fewest entries whose scores sum to at least the threshold's share of all. */
function fewest({ scores, sorted, reached, sum }, threshold) {
  let needed = 1;
  for (let i = 0; i < reached.length; i++) if (reached[i] < threshold * sum) needed++;
  return largest(scores, sorted, needed);
}

/** Marks the entries with the n largest scores above zero; of equal ones the first count. */
export function largest(scores, sorted, n) {
  const mask = new Uint8Array(scores.length);
  if (!scores.length || n < 1) return mask;
  const last = sorted[Math.max(0, sorted.length - n)];
  let left = n;
  for (let i = 0; i < scores.length; i++) if (scores[i] > last) left -= 1;
  for (let i = 0; i < scores.length; i++) {
    if (scores[i] > last || (scores[i] === last && left-- > 0)) mask[i] = scores[i] > 0 ? 1 : 0;
  }
  return mask;
}

/** Drops nodes without an outgoing edge, and features without an incoming one, until none is. */
function connected(graph, keepEdges, keepNodes) {
  const { n, source, target, isKeptAlways, isError } = graph;
  for (;;) {
    const hasOut = new Uint8Array(n);
    const hasIn = new Uint8Array(n);
    for (let e = 0; e < source.length; e++) {
      if (keepEdges[e] && keepNodes[source[e]] && keepNodes[target[e]]) {
        hasOut[source[e]] = 1;
        hasIn[target[e]] = 1;
      }
    }
    let changed = false;
    const still = keepNodes.map((kept, i) => {
      const stays = kept && (isKeptAlways[i] || (hasOut[i] && (hasIn[i] || isError[i]))) ? 1 : 0;
      changed ||= stays !== kept;
      return stays;
    });
    if (!changed) return keepNodes;
    keepNodes = still;
  }
}

/** Which nodes and edges to keep: {nodes, edges}, arrays of 0 and 1. */
export function pruneMasks(graph, nodeThreshold, edgeThreshold) {
  const { source, target } = graph;
  const { nodes: kept, edgeRanks } = forNodes(graph, nodeThreshold);
  const edges = fewest(edgeRanks, edgeThreshold);
  const nodes = connected(graph, edges, kept);
  return { nodes, edges: edges.map((k, e) => (k && nodes[source[e]] && nodes[target[e]] ? 1 : 0)) };
}

/** What a graph's sliders share: the influence of the whole graph, and the last node threshold. */
const remembered = new WeakMap();

/** The nodes kept by a threshold, and the scores of the edges between them. */
function forNodes(graph, threshold) {
  const { n, source, target, weight, logitWeights, isKeptAlways } = graph;
  let known = remembered.get(graph);
  if (!known) {
    const share = normalisedWeights(target, weight, n);
    known = { nodeRanks: ranked(influence(source, target, share, logitWeights, n)), threshold: null };
    remembered.set(graph, known);
  }
  if (known.threshold !== threshold) {
    const nodes = fewest(known.nodeRanks, threshold).map((kept, i) => (kept || isKeptAlways[i] ? 1 : 0));
    const inside = weight.map((w, e) => (nodes[source[e]] && nodes[target[e]] ? w : 0));
    const edgeRanks = ranked(edgeScores({ ...graph, weight: inside }).scores);
    Object.assign(known, { threshold, nodes, edgeRanks });
  }
  return known;
}

/** What each edge carries to the logits, with the nodes' influence and the edges' shares. */
export function edgeScores({ n, source, target, weight, logitWeights }) {
  const share = normalisedWeights(target, weight, n);
  const nodeInfluence = influence(source, target, share, logitWeights, n);
  const scores = share.map((s, e) => s * (nodeInfluence[target[e]] + logitWeights[target[e]]));
  return { scores, share, influence: nodeInfluence };
}

/** Replacement and completeness score of a graph, with what they were computed from. */
export function graphScores(graph) {
  const { n, source, target, logitWeights, isError, isToken } = graph;
  const out = edgeScores(graph);
  const fromError = new Float64Array(n);
  for (let e = 0; e < source.length; e++) {
    if (isError[source[e]]) fromError[target[e]] += out.share[e];
  }
  let tokens = 0;
  let errors = 0;
  let weighted = 0;
  let total = 0;
  for (let i = 0; i < n; i++) {
    if (isToken[i]) tokens += out.influence[i];
    if (isError[i]) errors += out.influence[i];
    const reach = out.influence[i] + logitWeights[i];
    weighted += (1 - fromError[i]) * reach;
    total += reach;
  }
  return {
    ...out,
    replacementScore: tokens + errors === 0 ? 1 : tokens / (tokens + errors),
    completenessScore: total === 0 ? 1 : weighted / total,
  };
}

/** The graph of the kept edges; nodes keep their numbers. */
export function keepEdges(graph, edges) {
  const picked = [];
  for (let e = 0; e < edges.length; e++) if (edges[e]) picked.push(e);
  return {
    ...graph,
    source: Uint32Array.from(picked, (e) => graph.source[e]),
    target: Uint32Array.from(picked, (e) => graph.target[e]),
    weight: Float32Array.from(picked, (e) => graph.weight[e]),
  };
}
