"""Batches of interventions on one prompt.

One run of the model each, but where a transcoder would have to travel as a whole and is large:
features that compete (TopK), or that answer in place of the MLPs. Then the values that it reads
come back, the features are computed here, and the next run gets what they write as vectors.
Features that are only read may be computed here too, from what comes back from the last run.

Legend: B rows, T positions, D d_model, p kept positions, G targets, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.remote.payload import tensor_bytes

from .feature_changes import set_features
from .intervention_request import PatchedModel
from .intervention_rows import Changes, error_vectors, layer_rows

logger = logging.getLogger(__name__)

#: Above this, whole transcoders stay here.
SHIP_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Outcome:
    """What a batch gave, on the CPU.

    Attributes:
        activations: Layer -> ``(B, n)`` of the features asked for: as set, or as computed.
        targets: ``(B, G)`` in float64: logits minus their mean, or products with directions.
        logits: ``(B, V)`` at the position asked for, before soft-capping; None if not asked for.
        probabilities: ``(B, V)`` there; the same.
    """

    activations: dict[int, Tensor]
    targets: Tensor
    logits: Tensor | None
    probabilities: Tensor | None


class InterventionRun:
    """Runs batches of interventions.

    Args:
        patched: The model, and what is asked of it.
    """

    def __init__(self, patched: PatchedModel) -> None:
        self.patched, self.patching, self.asked = patched, patched.patching, patched.asked
        self.token_ids, self.dtype = patched.token_ids, patched.dtype
        # Weights as stored, unless the set was told to load them coarser than is computed here.
        same = patched.transcoders.dtype in (None, self.dtype)
        self.transcoders = patched.transcoders if same else patched.transcoders.to(dtype=self.dtype)

    def run(
        self,
        n_rows: int,
        features: Mapping[int, Changes],
        errors: Mapping[int, Changes],
        tokens: Changes | None,
    ) -> Outcome:
        """One batch, whose first row has no changes.

        Args:
            n_rows: B.
            features: Layer -> features to set.
            errors: Layer -> errors to multiply.
            tokens: Tokens to multiply.

        Raises:
            SiteError: A norm, or an attention that is to be frozen, cannot be written down.
            RemoteError: The server, or the job there, failed.
        """
        parts = self._parts(features)
        vectors = self._error_vectors(errors)
        tokens_there = None if tokens is None else _plain(tokens)
        stay = self._staying(parts, n_rows)
        there = {layer: part for layer, part in parts.items() if layer not in stay}
        for layers in _rounds(stay, n_rows):
            kept = {layer: self._positions(stay[layer], "settings") for layer in layers}
            answer = self.patched.ask(n_rows, there, vectors, tokens_there, kept, max(layers))
            for layer, at in kept.items():
                _, deltas = self._set_here(layer, stay[layer], answer["kept"][layer], at)
                for target, delta in deltas.items():
                    vectors[target] = _with_entries(vectors.get(target), delta)
        kept = {n: self._positions(p, "read") for n, p in stay.items() if p["read"] is not None}
        answer = self.patched.ask(n_rows, there, vectors, tokens_there, kept, None)
        activations = answer["activations"]
        for layer, at in kept.items():
            found, _ = self._set_here(layer, stay[layer], answer["kept"][layer], at)
            activations |= {} if found is None else {layer: found}
        logits, capped, chances = answer["logits"], answer["capped"], None
        if logits is not None:
            chances = (logits if capped is None else capped).to(self.dtype).softmax(-1)
        return Outcome(activations, answer["targets"], logits, chances)

    def _parts(self, features: Mapping[int, Changes]) -> dict[int, dict[str, Any]]:
        """Layer -> what is needed of its transcoder."""
        patching, found = self.patching, {}
        for layer in self.transcoders.layers:
            part = layer_rows(
                self.transcoders,
                layer,
                features.get(layer),
                self.asked.read.get(layer),
                pinned=layer in patching.pinned,
                follow=layer in patching.follow,
            )
            if part is not None:
                found[layer] = part
        return found

    def _staying(
        self, parts: Mapping[int, dict[str, Any]], n_rows: int
    ) -> dict[int, dict[str, Any]]:
        """The layers whose features are computed here, from values that come back, because less
        travels then: those that are only read, where their rows are more than the values; and, if
        it is all much, those of which everything would be needed."""
        server = self.patching.server
        if server is None:
            return {}
        found = {}
        for layer, part in parts.items():
            if part["read"] is None or _changed_rows(part, n_rows):
                continue
            values = n_rows * len(self._positions(part, "read")) * self.patched.sites.d_model
            if tensor_bytes(part) > values * self.dtype.itemsize:
                found[layer] = part
        rest = {layer: part for layer, part in parts.items() if layer not in found}
        if tensor_bytes(rest) > min(SHIP_BYTES, server.max_bytes):
            logger.info("whole transcoders stay here: what they read comes back")
            widths = {layer: self.transcoders.config(layer).d_transcoder for layer in rest}
            found |= {n: p for n, p in rest.items() if _n_encoded(p) == widths[n]}
        return dict(sorted(found.items()))

    def _positions(self, part: dict[str, Any], what: str) -> Tensor:
        """Where the value that a layer's transcoder reads is needed, for its ``settings`` or for
        what is ``read``."""
        if what == "settings" and (part["follow"] or part["skip"] is not None):
            return torch.arange(len(self.token_ids))
        return part[what]["position"].unique()

    @torch.no_grad()
    def _set_here(
        self, layer: int, part: dict[str, Any], kept: Tensor, positions: Tensor
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """``set_features`` on values ``(B, p, D)`` that came back from some positions."""
        x = torch.zeros(len(kept), len(self.token_ids), kept.shape[-1], dtype=self.dtype)
        x[:, positions] = kept.to(self.dtype)
        acts, deltas = set_features(layer, part, x.to(part["encoder"].device))
        there = {target: delta.cpu() for target, delta in deltas.items()}
        return None if acts is None else acts.cpu(), there

    def _error_vectors(self, errors: Mapping[int, Changes]) -> dict[int, dict[str, Tensor]]:
        """Layer -> what changes of errors add to its output, and where."""
        nodes = [(layer, p) for layer, e in errors.items() for p in e.position.tolist()]
        if not nodes:
            return {}
        server = self.patching.server
        vectors = error_vectors(
            self.patched.model,
            self.patched.sites,
            self.transcoders,
            self.token_ids,
            nodes,
            self.dtype,
            None if server is None else replace(server, dtype=None),
        )
        found = {}
        for layer, changes in errors.items():
            own = torch.stack([vectors[layer, p] for p in changes.position.tolist()])
            more = (changes.factor - 1).to(own)[:, None] * own
            found[layer] = {"row": changes.row, "position": changes.position, "vector": more}
        return found


def _n_encoded(part: Mapping[str, Any]) -> int:
    return 0 if part["encoder"] is None else len(part["encoder"])


def _changed_rows(part: Mapping[str, Any], n_rows: int) -> set[int]:
    """In which rows a layer's output is changed by its transcoder."""
    if part["follow"] or part["skip"] is not None:
        return set(range(n_rows))
    return set() if part["settings"] is None else set(part["settings"]["row"].tolist())


def _rounds(parts: Mapping[int, dict[str, Any]], n_rows: int) -> Iterator[list[int]]:
    """Layers whose changes can be found in one run: those below which no change of the same row is
    still to be found."""
    left = {layer: _changed_rows(part, n_rows) for layer, part in sorted(parts.items())}
    left = {layer: rows for layer, rows in left.items() if rows}
    while left:
        below: set[int] = set()
        ready = []
        for layer, rows in left.items():
            if not rows & below:
                ready.append(layer)
            below |= rows
        yield ready
        left = {layer: rows for layer, rows in left.items() if layer not in ready}


def _with_entries(entries: dict[str, Tensor] | None, delta: Tensor) -> dict[str, Tensor]:
    """Vectors at rows and positions, and those of ``delta (B, T, D)`` that are not zero."""
    row, position = delta.abs().amax(-1).nonzero(as_tuple=True)
    more = {"row": row, "position": position, "vector": delta[row, position]}
    if entries is None:
        return more
    return {name: torch.cat([entries[name].to(more[name]), more[name]]) for name in more}


def _plain(changes: Changes) -> dict[str, Tensor]:
    return {"row": changes.row, "position": changes.position, "factor": changes.factor}
