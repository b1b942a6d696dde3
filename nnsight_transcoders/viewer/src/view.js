// What is shown for the current thresholds. No document: a test runs this file under node.
import { adjacency } from "./model.js";
import { graphScores, keepEdges, largest, pruneMasks } from "./prune.js";

/** Edges drawn faintly when nothing is selected. */
const BACKGROUND_EDGES = 250;

/** Thresholds that a page opens with: the usual ones, or none for a graph that is pruned already. */
export function defaultThresholds(raw) {
  return raw.pruning ? { node: 1, edge: 1 } : { node: 0.8, edge: 0.98 };
}

/** The shown graph. With both thresholds at 1 nothing is pruned. */
export function makeView(model, nodeThreshold, edgeThreshold) {
  const everything = nodeThreshold >= 1 && edgeThreshold >= 1;
  const masks = everything
    ? { nodes: new Uint8Array(model.n).fill(1), edges: null }
    : pruneMasks(model, nodeThreshold, edgeThreshold);
  const graph = masks.edges ? keepEdges(model, masks.edges) : model;
  const scores = graphScores(graph);
  const nodes = [];
  for (let i = 0; i < model.n; i++) if (masks.nodes[i]) nodes.push(i);
  const whole = everything && model.raw.n_edges === model.source.length;
  return {
    everything,
    keep: masks.nodes,
    nodes,
    source: graph.source,
    target: graph.target,
    weight: graph.weight,
    influence: scores.influence,
    edgeScore: scores.scores,
    // The whole graph's scores come from Python; those of a part are computed here.
    replacementScore: whole ? model.raw.scores.replacement_score : scores.replacementScore,
    completenessScore: whole ? model.raw.scores.completeness_score : scores.completenessScore,
    incoming: adjacency(graph.target, model.n),
    outgoing: adjacency(graph.source, model.n),
    omitted: omitted(model, masks.edges),
    strongest: strongest(scores.scores),
  };
}

/** What each target gets from sources that are not shown: grows with what was pruned. */
function omitted(model, edges) {
  const out = Float64Array.from(model.omitted);
  if (!edges) return out;
  for (let e = 0; e < edges.length; e++) if (!edges[e]) out[model.target[e]] += model.weight[e];
  return out;
}

function strongest(scores) {
  const mask = largest(scores, Float64Array.from(scores).sort(), BACKGROUND_EDGES);
  const edges = [];
  for (let e = 0; e < mask.length; e++) if (mask[e]) edges.push(e);
  return edges.sort((a, b) => scores[b] - scores[a] || a - b);
}

/** Edges at a node, largest weight first: [{edge, node, weight}], node being the other end. */
export function links(view, node, direction) {
  const edges = direction === "in" ? view.incoming.of(node) : view.outgoing.of(node);
  const other = direction === "in" ? view.source : view.target;
  const list = Array.from(edges, (edge) => ({ edge, node: other[edge], weight: view.weight[edge] }));
  return list.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
}
