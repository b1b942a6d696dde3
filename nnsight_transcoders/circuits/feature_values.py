"""Chosen features of a set: their virtual weights, and their values on one run.

The two halves of ``global_weights.py``: what does not depend on the input, computed once, and what
does, position by position.

Legend: n source features, m target features, T positions, D d_model, F features of a layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnsight_transcoders.errors import InputError
from nnsight_transcoders.sets import TranscoderSet

from .active import Sparse, chosen_jointly, sparse_encode
from .collect import Run
from .invariant import InvariantModel

#: Features by layer: each one's number, and which of the chosen ones it is.
Chosen = dict[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Values:
    """One run's values of the chosen features, positions that a set leaves out cut off.

    Attributes:
        sources: ``(T, n)`` activations.
        targets: ``(T, m)`` activations.
        read: ``(T, m)`` inverse denominators of the norms that targets read through.
        write: Per group of ``PairWeights``, ``(T, 1)`` those of the norm that is written through.
    """

    sources: Tensor
    targets: Tensor
    read: Tensor
    write: dict[int, Tensor]


def by_layer(transcoders: TranscoderSet, features: Sequence[tuple[int, int]]) -> Chosen:
    """Group features by layer.

    Raises:
        InputError: A layer or feature that the set has not.
    """
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for column, (layer, feature) in enumerate(features):
        width = transcoders.config(layer).d_transcoder
        if not 0 <= feature < width:
            raise InputError(f"layer {layer} has features 0 to {width - 1}, not {feature}")
        found[layer].append((feature, column))
    return {
        layer: (torch.tensor([f for f, _ in pairs]), torch.tensor([c for _, c in pairs]))
        for layer, pairs in sorted(found.items())
    }


class PairWeights:
    """Direct virtual weights of feature pairs, apart by the norm that is written through.

    Args:
        invariant: The model.
        transcoders: Its set.
        sources: ``(layer, feature)`` that write.
        targets: ``(layer, feature)`` that read.

    Attributes:
        groups: Layer whose norm behind the MLP is written through, or -1 for none -> ``(n, m)``.
        virtual: Their sum ``(n, m)``; all in float64 on the CPU.

    Raises:
        InputError: No target is above any source.
    """

    def __init__(
        self,
        invariant: InvariantModel,
        transcoders: TranscoderSet,
        sources: Sequence[tuple[int, int]],
        targets: Sequence[tuple[int, int]],
    ) -> None:
        shape = len(sources), len(targets)
        self.virtual = torch.zeros(shape, dtype=torch.float64)
        self.groups: dict[int, Tensor] = {}
        read_at = by_layer(transcoders, targets)
        reads = {
            layer: invariant.read(transcoders, layer, transcoders.rows(layer, chosen, "encoder"))
            for layer, (chosen, _) in read_at.items()
        }
        for source, (features, rows) in by_layer(transcoders, sources).items():
            decoder = transcoders.rows(source, features, "decoder")
            slots = decoder[:, None] if decoder.dim() == 2 else decoder
            for j, layer in enumerate(transcoders.targets(source)):
                written = invariant.written(transcoders, layer, slots[:, j])
                group = -1 if invariant.write_norm(transcoders, layer) is None else layer
                for target, (_, columns) in read_at.items():
                    if layer < target:
                        block = self.groups.setdefault(group, torch.zeros_like(self.virtual))
                        weights = (written @ reads[target].T).double().cpu()
                        block[rows[:, None], columns] += weights
        if not self.groups:
            raise InputError("no target is at a layer above one that a source writes to")
        for block in self.groups.values():
            self.virtual += block


class FeatureValues:
    """Activations and denominators of chosen features on runs.

    Args:
        invariant: The model.
        transcoders: Its set; the layers of the chosen features are loaded and kept.
        sources: ``(layer, feature)`` that write.
        targets: ``(layer, feature)`` that read.
    """

    def __init__(
        self,
        invariant: InvariantModel,
        transcoders: TranscoderSet,
        sources: Sequence[tuple[int, int]],
        targets: Sequence[tuple[int, int]],
    ) -> None:
        self._invariant, self._set = invariant, transcoders
        self._sources, self._targets = (
            by_layer(transcoders, sources),
            by_layer(transcoders, targets),
        )
        self._width = {"sources": len(sources), "targets": len(targets)}
        self._leading = max(transcoders.config(layer).leading_positions for layer in transcoders)
        together = transcoders.joint_k is not None
        layers = () if together else {*self._sources, *self._targets}
        self._modules = {
            layer: transcoders.load(layer, dtype=invariant.dtype).to(invariant.device)
            for layer in layers
        }

    def __call__(self, run: Run) -> Values:
        """The values on a run, on the CPU in float64."""
        active = self._active(run)
        read = torch.ones(run.n_positions, self._width["targets"], dtype=torch.float64)
        for layer, (_, columns) in self._targets.items():
            if self._invariant.read_norm(self._set, layer) is not None:
                path = self._invariant.sites.layers[layer].mlp_norm
                read[:, columns] = self._scale(path, run.mid[layer])
        write = {-1: torch.ones(run.n_positions, 1, dtype=torch.float64)}
        for layer in {t for source in self._sources for t in self._set.targets(source)}:
            if self._invariant.write_norm(self._set, layer) is not None:
                path = self._invariant.sites.layers[layer].mlp_post_norm
                write[layer] = self._scale(path, run.mlp_out[layer])
        cut = self._leading
        return Values(
            sources=self._dense(active, self._sources, "sources", run.n_positions)[cut:],
            targets=self._dense(active, self._targets, "targets", run.n_positions)[cut:],
            read=read[cut:],
            write={group: scale[cut:] for group, scale in write.items()},
        )

    def _active(self, run: Run) -> dict[int, Sparse]:
        dtype = self._invariant.dtype
        if self._set.joint_k is not None:
            inputs = [self._input(run, layer) for layer in range(len(run.resid))]
            return chosen_jointly(run, self._set, inputs, dtype)
        with torch.no_grad():
            return {
                layer: sparse_encode(module, self._input(run, layer))
                for layer, module in self._modules.items()
            }

    def _input(self, run: Run, layer: int) -> Tensor:
        """The value at a layer's input site ``(T, D)``."""
        site = self._set.config(layer).input_site if layer in self._set else "R"
        if site == "N0":
            path = str(self._invariant.sites.layers[layer].mlp_norm)
            spec = self._invariant.norm_spec(path, run.mid[layer])
            return spec.normalise(run.mid[layer].to(self._invariant.dtype))
        return (run.mid if site == "R" else run.mlp_in)[layer].to(self._invariant.dtype)

    def _scale(self, path: str | None, x: Tensor) -> Tensor:
        spec = self._invariant.norm_spec(str(path), x)
        return spec.scale(x.to(self._invariant.dtype)).double().cpu()

    def _dense(
        self, active: dict[int, Sparse], chosen: Chosen, side: str, n_positions: int
    ) -> Tensor:
        """Activations ``(T, n)`` of the chosen features out of the sparse ones."""
        dense = torch.zeros(n_positions, self._width[side], dtype=torch.float64)
        for layer, (features, columns) in chosen.items():
            position, index, activation, _ = (part.cpu() for part in active[layer])
            which, place = features.unique(return_inverse=True)
            mine = torch.isin(index, which)
            table = torch.zeros(n_positions, len(which), dtype=torch.float64)
            at = torch.searchsorted(which, index[mine])
            table[position[mine], at] = activation[mine].double()
            dense[:, columns] = table[:, place]
        return dense
