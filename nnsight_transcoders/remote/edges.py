"""The second request of a remote graph: its edges, in one job or in as many as the bound allows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from nnsight_transcoders.circuits.candidates import Candidates
from nnsight_transcoders.circuits.edge_table import EdgeTable
from nnsight_transcoders.circuits.edges import batch_size
from nnsight_transcoders.circuits.expand import next_wave
from nnsight_transcoders.errors import PayloadTooLargeError

from .edge_job import chunk_edges, unpack_rows
from .payload import MARGIN, ModelShape, base_bytes, megabytes, tensor_bytes
from .problem import EdgeProblem

logger = logging.getLogger(__name__)

#: Runs a shipped function on a request and returns its result.
Ask = Callable[[Callable[..., Any], dict[str, Any]], Any]


@dataclass(frozen=True)
class RemoteEdges:
    """What edge requests gave.

    Attributes:
        table: The edges.
        direction: ``(G, D)`` the targets' directions.
        target_bias: ``(G,)`` the unembedding's own bias for them, demeaned.
    """

    table: EdgeTable
    direction: Tensor
    target_bias: Tensor


def whole_edges(result: dict[str, Any], dtype: torch.dtype) -> RemoteEdges:
    """From ``edge_job.graph_edges``' answer."""
    table = EdgeTable(
        features=result["features"],
        rows=unpack_rows(result["rows"], dtype),
        omitted=result["omitted"],
        total=result["total"],
        bias=result["bias"],
    )
    return RemoteEdges(table, result["direction"], result["target_bias"])


class ChunkedEdges:
    """Edges of a graph whose vectors do not fit into one request.

    Features are divided into blocks; a request brings the edges from one block of sources into one
    block of targets. More active features than nodes are expanded in waves, as ``expand`` does.

    Args:
        problem: The graph's edges.
        candidates: Its candidate nodes.
        ask: Sends one request.
        max_nodes: Bound on the number of features.
        max_bytes: Bound on a request.
        shape: The model's.
        verbose: Show progress.

    Raises:
        PayloadTooLargeError: Not even one feature fits into a request.
    """

    def __init__(
        self,
        problem: EdgeProblem,
        candidates: Candidates,
        ask: Ask,
        max_nodes: int,
        max_bytes: int,
        shape: ModelShape,
        *,
        verbose: bool,
    ) -> None:
        self._problem, self._candidates, self._ask = problem, candidates, ask
        self._n_expand = min(max_nodes, candidates.n_features)
        self._verbose, self._shape = verbose, shape
        self._room = self._room_of(max_bytes) / 2
        self._source_bytes = problem.feature_bytes("encoder")
        self._target_bytes = problem.feature_bytes("decoder")
        self._check_room(max_bytes)
        self._directions: dict[str, Tensor] = {}

    def _room_of(self, max_bytes: int) -> float:
        """Bytes that are left for features in a request."""
        none = torch.arange(0)
        fixed = tensor_bytes(self._problem.part(none, none, others=True))
        return max_bytes / MARGIN - fixed - base_bytes(self._shape)

    def _check_room(self, max_bytes: int) -> None:
        largest = float(torch.cat([self._source_bytes, self._target_bytes]).max())
        if self._room < largest:
            raise PayloadTooLargeError(
                f"norms and errors take {megabytes(max_bytes - 2 * self._room)} and a feature "
                f"{megabytes(largest)}, but a request may have {megabytes(max_bytes)}. Raise it "
                "with RemoteServer(max_bytes=...), shorten the prompt, or pass weights= so that "
                "the edges are computed here"
            )

    def _blocks(self, features: Tensor, n_bytes: Tensor) -> list[Tensor]:
        """Features in order, in blocks that take half of a request's room each."""
        blocks: list[list[int]] = [[]]
        left = self._room
        for number, size in zip(features.tolist(), n_bytes[features].tolist(), strict=True):
            if size > left:
                blocks.append([])
                left = self._room
            blocks[-1].append(number)
            left -= size
        return [torch.tensor(block, dtype=torch.long) for block in blocks]

    def compute(self) -> RemoteEdges:
        """Send the requests and put their answers together."""
        candidates, n_targets = self._candidates, len(self._candidates.chosen.names)
        rows = torch.zeros(n_targets + self._n_expand, candidates.n_columns, dtype=candidates.dtype)
        totals = torch.zeros(2, len(rows), dtype=candidates.dtype)
        rows[:n_targets], totals[:, :n_targets] = self._rows(None)
        expanded = torch.empty(self._n_expand, dtype=torch.long)
        done, context = 0, self._problem.context
        # The waves of a graph that is computed in one piece, so that it has the same nodes.
        wave_size = batch_size(
            context["n_positions"],
            context["d_model"],
            candidates.n_columns,
            rows.element_size(),
            context["memory"],
        )
        with tqdm(total=self._n_expand, desc="edges", disable=not self._verbose) as bar:
            while done < self._n_expand:
                wave = next_wave(candidates, rows, expanded[:done], self._n_expand, wave_size)
                for features in self._blocks(wave.sort().values, self._target_bytes):
                    at = slice(n_targets + done, n_targets + done + len(features))
                    rows[at], totals[:, at] = self._rows(features)
                    expanded[done : done + len(features)] = features
                    done += len(features)
                    bar.update(len(features))
        return self._edges(rows, totals, expanded)

    def _rows(self, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        """Whole rows ``(n, C)`` of some features, or of the logits; their totals and biases."""
        candidates, parts, total = self._candidates, [], None
        rest: Tensor | None = None
        for sources in self._blocks(torch.arange(candidates.n_features), self._source_bytes):
            first = rest is None
            answer = self._ask(chunk_edges, self._problem.part(sources, targets, others=first))
            rows = unpack_rows(answer["rows"], candidates.dtype)
            parts.append(rows[:, : len(sources)])
            if first:
                rest, total = (
                    rows[:, len(sources) :],
                    torch.stack([answer["total"], answer["bias"]]),
                )
                self._directions = {k: answer[k] for k in ("direction", "target_bias")}
        assert rest is not None and total is not None
        # The logits come last in a table; without features they are all there is.
        n = len(parts[0])
        kept = total[:, -n:] if targets is None else total[:, :n]
        return torch.cat([*parts, rest], 1), kept

    def _edges(self, rows: Tensor, totals: Tensor, expanded: Tensor) -> RemoteEdges:
        candidates, n_targets = self._candidates, len(self._candidates.chosen.names)
        order = expanded.argsort()
        at = torch.cat([n_targets + order, torch.arange(n_targets)])
        others = torch.arange(candidates.n_features, candidates.n_columns)
        kept = torch.cat([expanded[order], others])
        left_out = torch.ones(candidates.n_columns, dtype=torch.bool)
        left_out[kept] = False
        rows, totals = rows[at], totals[:, at]
        table = EdgeTable(
            features=expanded[order],
            rows=rows[:, kept],
            omitted=rows[:, left_out].sum(1),
            total=totals[0],
            bias=totals[1],
        )
        return RemoteEdges(table, self._directions["direction"], self._directions["target_bias"])
