"""``AttributionGraph``: the nodes and edges of one prompt's circuit (torch only, no nnsight).

Nodes are features, error nodes, token embeddings and logit targets; an edge's weight is the direct
effect of its source on its target through the frozen linear model (Ameisen et al. 2025, "Circuit
Tracing"). Every target also carries what no node explains: the constant terms (``bias``) and what
came from sources that are not in the graph (``omitted``), so that

    total[target] = sum of incoming edge weights + bias[target] + omitted[target]

holds to rounding, which ``completeness_error`` reports, before and after pruning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nnsight_transcoders._files import atomic_path
from nnsight_transcoders.errors import InputError

from . import graph_views
from . import prune as _prune
from . import subgraphs as _subgraphs
from .graph_exports import GraphExports
from .graph_io import KINDS, read_graph, write_graph

if TYPE_CHECKING:
    import networkx

FEATURE, ERROR, TOKEN, LOGIT = range(len(KINDS))


@dataclass(frozen=True)
class Node:
    """One node, for reading: what ``graph.node(i)`` returns.

    Attributes:
        number: Its row in the graph's tables.
        kind: ``"feature"``, ``"error"``, ``"token"`` or ``"logit"``.
        layer: Its layer; -1 for tokens, the number of layers for logits.
        position: Its position in the prompt's own tokens.
        index: Feature index, token id or vocabulary id; -1 for error nodes; -1, -2, ... for custom
            target directions.
        value: Activation of a feature, norm of an error or token vector, value of a logit.
        id: A name that is unique in the graph, such as ``"8_355_12"``.
    """

    number: int
    kind: str
    layer: int
    position: int
    index: int
    value: float
    id: str


@dataclass(frozen=True, eq=False)
class AttributionGraph(GraphExports):
    """A prompt's attribution graph. Tensors of length N have one entry per node.

    Attributes:
        kind: ``(N,)`` codes into ``KINDS``.
        layer: ``(N,)``; -1 for tokens, ``n_layers`` for logits.
        position: ``(N,)`` position in the prompt's own tokens.
        index: ``(N,)`` feature index, token or vocabulary id (see ``Node``).
        value: ``(N,)`` activation, norm or logit (see ``Node``).
        source: ``(E,)`` node numbers the edges start from.
        target: ``(E,)`` node numbers they end in.
        weight: ``(E,)`` direct effects, in units of the target's pre-activation or logit.
        total: ``(N,)`` what a target's row has to sum to: its pre-activation, or the logit minus
            the mean logit; zero for nodes that are not targets.
        bias: ``(N,)`` the constant terms of each target.
        omitted: ``(N,)`` what each target gets from sources that are not (or no more) nodes.
        probability: ``(N,)`` the model's probability of a logit node's token, zero elsewhere.
        tokens: The prompt's tokens as text.
        token_ids: The prompt's token ids.
        target_names: Text of each logit node, in node order.
        metadata: JSON-ready record: prompt, model, set, versions, settings, method.
    """

    kind: Tensor
    layer: Tensor
    position: Tensor
    index: Tensor
    value: Tensor
    source: Tensor
    target: Tensor
    weight: Tensor
    total: Tensor
    bias: Tensor
    omitted: Tensor
    probability: Tensor
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    target_names: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    # -- size and lookup -------------------------------------------------------------------------

    @property
    def n_nodes(self) -> int:
        """Number of nodes N."""
        return int(self.kind.shape[0])

    @property
    def n_edges(self) -> int:
        """Number of edges E."""
        return int(self.weight.shape[0])

    @property
    def n_layers(self) -> int:
        """Number of layers of the model."""
        return int(self.metadata.get("n_layers", self.layer.max().item()))

    def __len__(self) -> int:
        return self.n_nodes

    def of_kind(self, kind: str) -> Tensor:
        """Numbers of the nodes of one kind, ``(n,)``."""
        if kind not in KINDS:
            raise InputError(f"unknown node kind {kind!r}; known: {', '.join(KINDS)}")
        return (self.kind == KINDS.index(kind)).nonzero().flatten()

    def node(self, number: int) -> Node:
        """The node with this number."""
        if not -self.n_nodes <= number < self.n_nodes:
            raise InputError(f"the graph has nodes 0 to {self.n_nodes - 1}, not {number}")
        number %= self.n_nodes
        kind = KINDS[int(self.kind[number])]
        layer, position, index = (int(t[number]) for t in (self.layer, self.position, self.index))
        name = {
            "feature": f"{layer}_{index}_{position}",
            "error": f"{layer}_error_{position}",
            "token": f"E_{index}_{position}",
            "logit": f"L_{index}_{position}",
        }[kind]
        return Node(number, kind, layer, position, index, float(self.value[number]), name)

    def nodes(self) -> Iterator[Node]:
        """All nodes in order."""
        return (self.node(i) for i in range(self.n_nodes))

    def find(self, layer: int, feature: int, position: int) -> Node:
        """The node of a feature.

        Raises:
            InputError: The feature is not a node of this graph.
        """
        mask = (
            (self.kind == FEATURE)
            & (self.layer == layer)
            & (self.index == feature)
            & (self.position == position)
        )
        found = mask.nonzero().flatten()
        if not len(found):
            raise InputError(
                f"feature {feature} of layer {layer} at position {position} is not in the graph"
            )
        return self.node(int(found[0]))

    def label(self, number: int) -> str:
        """A node as text a person reads, such as ``'layer 8 feature 355 at 12 " to"'``."""
        node = self.node(number)
        token = self.tokens[node.position] if 0 <= node.position < len(self.tokens) else "?"
        where = f"at {node.position} {token!r}"
        if node.kind == "feature":
            return f"layer {node.layer} feature {node.index} {where}"
        if node.kind == "error":
            return f"layer {node.layer} error {where}"
        if node.kind == "token":
            return f"token {where}"
        name = self.target_names[int((self.of_kind("logit") == node.number).nonzero())]
        return f"logit {name!r} p={float(self.probability[node.number]):.3f}"

    # -- edges -----------------------------------------------------------------------------------

    def adjacency(self) -> Tensor:
        """Dense ``(N, N)`` matrix: entry ``[target, source]`` is the edge's weight."""
        dense = torch.zeros(self.n_nodes, self.n_nodes, dtype=self.weight.dtype)
        dense[self.target, self.source] = self.weight
        return dense

    def edges_into(self, number: int) -> list[tuple[Node, float]]:
        """(source, weight) of a node's incoming edges, largest magnitude first."""
        return self._ranked(self.target == number, self.source)

    def edges_out_of(self, number: int) -> list[tuple[Node, float]]:
        """(target, weight) of a node's outgoing edges, largest magnitude first."""
        return self._ranked(self.source == number, self.target)

    def _ranked(self, mask: Tensor, ends: Tensor) -> list[tuple[Node, float]]:
        weights, ends = self.weight[mask], ends[mask]
        order = weights.abs().argsort(descending=True)
        return [(self.node(int(ends[i])), float(weights[i])) for i in order]

    # -- what can be checked ---------------------------------------------------------------------

    @property
    def is_target(self) -> Tensor:
        """``(N,)`` bool: features and logits, whose incoming edges were computed."""
        return (self.kind == FEATURE) | (self.kind == LOGIT)

    def closure(self) -> Tensor:
        """``(N,)``: ``total - incoming - bias - omitted`` of each target; zero up to rounding."""
        incoming = torch.zeros_like(self.total, dtype=torch.float64)
        incoming.index_add_(0, self.target, self.weight.double())
        left = self.total.double() - incoming - self.bias.double() - self.omitted.double()
        return torch.where(self.is_target, left, torch.zeros_like(left))

    @property
    def completeness_error(self) -> float:
        """Largest relative closure error over the targets.

        ``|total - sum of everything| / max(|total|, mean |total| over the targets)``: the second
        term of the maximum keeps a pre-activation that happens to be near zero from turning
        rounding into a large ratio.
        """
        targets = self.is_target
        if not targets.any():
            return 0.0
        size = self.total.double().abs()
        scale = size.clamp_min(size[targets].mean().item())
        return float((self.closure().abs() / scale)[targets].max())

    def influence(self) -> Tensor:
        """``(N,)`` influence of each node on the logits (see ``prune.influence``)."""
        return _prune.influence(
            self.source, self.target, self.weight, self.logit_weights(), self.n_nodes
        )

    def logit_weights(self) -> Tensor:
        """``(N,)`` the weight each logit node starts with: its probability, or equal shares."""
        logits = self.kind == LOGIT
        weights = torch.where(logits, self.probability, torch.zeros_like(self.probability))
        if weights.sum() == 0:
            weights = logits.to(weights.dtype) / logits.sum().clamp_min(1)
        return weights

    @property
    def replacement_score(self) -> float:
        """Share of the end-to-end influence that comes from tokens and not from error nodes."""
        return _prune.replacement_score(self.influence(), self.kind == TOKEN, self.kind == ERROR)

    @property
    def completeness_score(self) -> float:
        """Share of the nodes' incoming influence, weighted by theirs, not from error nodes."""
        return _prune.completeness_score(
            self.source,
            self.target,
            self.weight,
            self.influence() + self.logit_weights(),
            self.kind == ERROR,
        )

    # -- derived graphs --------------------------------------------------------------------------

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> AttributionGraph:
        """The fewest nodes and edges that carry the given shares of the influence.

        Args:
            node_threshold: Share of the nodes' influence to keep, in (0, 1].
            edge_threshold: Share of the edges' influence to keep among those nodes, in (0, 1].

        Returns:
            A graph whose ``omitted`` has grown by what the removed edges carried, so that it still
            closes; its metadata records the thresholds and both scores before pruning.
        """
        return _subgraphs.pruned(self, node_threshold, edge_threshold)

    def subgraph(self, keep_nodes: Tensor, keep_edges: Tensor | None = None) -> AttributionGraph:
        """The graph of some nodes and edges; what falls away is added to ``omitted``.

        Args:
            keep_nodes: ``(N,)`` bool.
            keep_edges: ``(E,)`` bool (default: all between kept nodes).
        """
        return _subgraphs.subgraph(self, keep_nodes, keep_edges)

    # -- files and views -------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the graph as one safetensors file (tables as tensors, the rest as JSON in it).

        Raises:
            InputError: The folder cannot be written; nothing is left behind.
        """
        tables = {name: getattr(self, name).contiguous() for name in _table_names()}
        record = {
            "tokens": list(self.tokens),
            "token_ids": list(self.token_ids),
            "target_names": list(self.target_names),
            "metadata": self.metadata,
        }
        return write_graph(Path(path), tables, record)

    @classmethod
    def load(cls, path: str | Path) -> AttributionGraph:
        """Read a graph that ``save`` wrote.

        Raises:
            CheckpointError: Not such a file, or a damaged one.
        """
        tables, record = read_graph(Path(path), _table_names())
        return cls(
            **tables,
            tokens=tuple(record["tokens"]),
            token_ids=tuple(record["token_ids"]),
            target_names=tuple(record["target_names"]),
            metadata=record["metadata"],
        )

    def to_networkx(self) -> networkx.DiGraph:
        """A ``networkx.DiGraph`` with the nodes' fields and edge weights as attributes.

        Raises:
            InputError: networkx is not installed (``pip install 'nnsight-transcoders[viz]'``).
        """
        return graph_views.to_networkx(self)

    def to_html(self, path: str | Path | None = None, **options: Any) -> str:
        """One self-contained interactive page; written to ``path`` if given, and returned.

        Args:
            path: Where to write it.
            **options: See ``viewer.page.render_graph``.
        """
        from nnsight_transcoders.viewer.page import render_graph

        html = render_graph(self, **options)
        if path is not None:
            with atomic_path(Path(path)) as partial:
                partial.write_text(html, encoding="utf-8")
        return html

    def _repr_html_(self) -> str:
        from nnsight_transcoders.viewer.page import notebook_frame

        return notebook_frame(self)

    def summary(self, top: int = 8) -> str:
        """A few lines of text: size, checks, scores, and the most influential nodes."""
        return graph_views.summary(self, top)

    def __repr__(self) -> str:
        return self.summary()


def _table_names() -> Sequence[str]:
    return [f.name for f in fields(AttributionGraph) if f.type == "Tensor"]
