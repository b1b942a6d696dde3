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

/** Marks the fewest entries whose scores sum to at least the threshold's share of all. */
function fewest(scores, threshold) {
  const mask = new Uint8Array(scores.length);
  if (!scores.length) return mask;
  const order = Uint32Array.from(scores, (_, i) => i);
  order.sort((a, b) => scores[b] - scores[a] || a - b);
  const reached = new Float64Array(scores.length);
  let sum = 0;
  for (let i = 0; i < order.length; i++) reached[i] = sum += scores[order[i]];
  let needed = 1;
  for (let i = 0; i < order.length; i++) if (reached[i] < threshold * sum) needed++;
  for (let i = 0; i < Math.min(needed, order.length); i++) {
    if (scores[order[i]] > 0) mask[order[i]] = 1;
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
  const { n, source, target, weight, logitWeights, isKeptAlways } = graph;
  const share = normalisedWeights(target, weight, n);
  let nodes = fewest(influence(source, target, share, logitWeights, n), nodeThreshold);
  nodes = nodes.map((kept, i) => (kept || isKeptAlways[i] ? 1 : 0));
  const inside = weight.map((w, e) => (nodes[source[e]] && nodes[target[e]] ? w : 0));
  const scores = edgeScores({ ...graph, weight: inside }).scores;
  const edges = fewest(scores, edgeThreshold);
  nodes = connected(graph, edges, nodes);
  return { nodes, edges: edges.map((k, e) => (k && nodes[source[e]] && nodes[target[e]] ? 1 : 0)) };
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
