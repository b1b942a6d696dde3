"""Which features are active on a run, what they reconstruct, and what is left as error.

Layers are loaded one at a time and let go; what is kept of them are the encoder and decoder rows
of the active features, each once, or (``offload``) where to read them.

Legend: n active features of a layer, W layers they write to, T positions, D d_model, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from nnsight_transcoders.layer_sources import Rows
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.transcoder import CrossLayerPart, FeatureEncoder, Transcoder

from .collect import Run
from .layer_features import ActiveFeatures, LayerFeatures

#: Active features of one layer: positions, indices, activations, pre-activations, each ``(n,)``.
Sparse = tuple[Tensor, Tensor, Tensor, Tensor]

#: Where rows wait that are not used at the moment.
Offload = Literal["cpu", "disk"]

#: Upper bound on the dense pre-activations held at a time, in elements.
CHUNK_ELEMENTS = 16 * 2**20
#: Features whose written vectors are held at a time.
WRITTEN_AT_A_TIME = 8192


class _HostRows:
    """Rows in the computer's memory, brought to the run's device when they are used."""

    def __init__(self, table: Tensor, device: torch.device) -> None:
        self._table, self._device = table.cpu(), device

    def __getitem__(self, which: Tensor) -> Tensor:
        return self._table[which.cpu()].to(self._device)

    def written_to(self, j: int) -> Tensor:
        return self._table[:, j].to(self._device)


class _StoredRows:
    """Rows that stay where the set is, and are read from its files when they are used."""

    def __init__(
        self, transcoders: TranscoderSet, layer: int, distinct: Tensor, which: Rows, like: Tensor
    ) -> None:
        self._transcoders, self._layer = transcoders, layer
        self._which: Rows = which
        self._distinct, self._like = distinct, like

    def __getitem__(self, which: Tensor) -> Tensor:
        rows = self._transcoders.rows(self._layer, self._distinct[which], self._which)
        rows = rows.to(self._like)
        return rows[:, None] if self._which == "decoder" and rows.dim() == 2 else rows

    def written_to(self, j: int) -> Tensor:
        return self[torch.arange(len(self._distinct), device=self._distinct.device)][:, j]


class _Store:
    """Takes the rows of a layer's distinct active features to where they wait."""

    def __init__(
        self,
        transcoders: TranscoderSet,
        offload: Offload | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        same = transcoders.dtype in (None, dtype)  # as ``TranscoderSet.load`` decides
        self._transcoders = transcoders if same else transcoders.to(dtype=dtype)
        self._offload, self._like = offload, torch.empty(0, dtype=dtype, device=device)

    def __call__(
        self, module: Transcoder | CrossLayerPart, layer: int, distinct: Tensor, which: Rows
    ) -> Tensor | _HostRows | _StoredRows:
        if self._offload == "disk":
            return _StoredRows(self._transcoders, layer, distinct, which, self._like)
        table = (module.W_enc if which == "encoder" else module.W_dec).detach()[distinct]
        if which == "decoder" and table.dim() == 2:
            table = table[:, None]
        return _HostRows(table, self._like.device) if self._offload == "cpu" else table


def output_site(run: Run, layer: int, transcoders: TranscoderSet) -> Tensor:
    """The value a layer's transcoder stands for; site O' where there is none."""
    if layer in transcoders and transcoders.config(layer).output_site == "O":
        return run.mlp_out[layer]
    return run.mlp_post[layer]


def active_features(
    run: Run,
    transcoders: TranscoderSet,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    offload: Offload | None = None,
    verbose: bool = False,
) -> ActiveFeatures:
    """Encode a run layer by layer.

    Args:
        run: What ``collect`` kept.
        transcoders: The set.
        inputs: Per layer, the input-site value ``(T, D)`` in ``dtype``.
        dtype: In which everything is computed and kept.
        offload: Where the encoder and decoder rows of the active features wait until they are
            used: on the run's device (None), in the computer's memory, or in the set's own files.
        verbose: Show progress.
    """
    n_layers = len(run.resid)
    outputs = [output_site(run, layer, transcoders).to(dtype) for layer in range(n_layers)]
    errors = [output.clone() for output in outputs]
    biases: list[Tensor | None] = [None] * n_layers
    layers = {}
    store = _Store(transcoders, offload, dtype, run.final.device)
    chosen = chosen_jointly(run, transcoders, inputs, dtype)
    for layer in tqdm(transcoders.layers, desc="features", disable=not verbose, leave=False):
        module = transcoders.load(layer, dtype=dtype).to(run.final.device)
        with torch.no_grad():
            sparse = chosen.get(layer) or sparse_encode(module, inputs[layer])
            layers[layer] = _layer_features(module, sparse, layer, store)
            biases[layer] = module.b_dec.detach().clone()  # a view would keep the file mapped
            errors[layer] -= module.b_dec + module.skip(inputs[layer])
            _subtract(errors, layers[layer], module)
    return ActiveFeatures(layers, biases, errors, outputs)


def _layer_features(
    module: Transcoder | CrossLayerPart, sparse: Sparse, layer: int, store: _Store
) -> LayerFeatures:
    position, index, activation, pre = sparse
    distinct, row = index.unique(return_inverse=True)
    return LayerFeatures(
        position=position,
        index=index,
        activation=activation,
        pre_activation=pre,
        encoder_bias=module.b_enc.detach()[index],
        row=row,
        encoder=store(module, layer, distinct, "encoder"),
        decoder=store(module, layer, distinct, "decoder"),
        targets=(layer,) if isinstance(module, Transcoder) else module.targets,
    )


def chosen_jointly(
    run: Run, transcoders: TranscoderSet, inputs: Sequence[Tensor], dtype: torch.dtype
) -> dict[int, Sparse]:
    """Layer -> active features, where they are chosen over all layers together; else nothing.

    A pass of its own, so that decoder rows are only gathered of the features that stay. No layer
    can contribute more than k features to a position, so no more than those are held per layer.
    """
    k = transcoders.joint_k
    if k is None:
        return {}
    found, scores = {}, {}
    for layer in transcoders.layers:
        module = transcoders.load(layer, dtype=dtype).to(run.final.device)
        with torch.no_grad():
            sparse = sparse_encode(module, inputs[layer])
            score = sparse[2] * module.decoder_norms()[sparse[1]]
        kept = largest_per_position(sparse[0], score, k)
        found[layer], scores[layer] = _masked(sparse, kept), score[kept]
    positions = torch.cat([sparse[0] for sparse in found.values()])
    kept = largest_per_position(positions, torch.cat(list(scores.values())), k)
    masks = kept.split([len(score) for score in scores.values()])
    return {
        layer: _masked(sparse, mask)
        for (layer, sparse), mask in zip(found.items(), masks, strict=True)
    }


def _masked(sparse: Sparse, kept: Tensor) -> Sparse:
    position, index, activation, pre = sparse
    return position[kept], index[kept], activation[kept], pre[kept]


def largest_per_position(position: Tensor, score: Tensor, k: int) -> Tensor:
    """Mask ``(n,)`` of the entries that are among the ``k`` largest scores of their position."""
    order = score.argsort(descending=True, stable=True)
    order = order[position[order].argsort(stable=True)]
    counts = torch.bincount(position)
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(position), device=position.device) - starts[position[order]]
    kept = torch.zeros_like(position, dtype=torch.bool)
    kept[order] = rank < k
    return kept


def sparse_encode(module: FeatureEncoder, x: Tensor) -> Sparse:
    """The active features of ``x (T, D)``: positions, indices, activations, pre-activations.

    Positions are taken in chunks, so that at most ``CHUNK_ELEMENTS`` dense values exist at a time.
    The leading positions that the set was not trained on are left out.
    """
    rows = max(1, CHUNK_ELEMENTS // module.config.d_transcoder)
    parts = []
    for start in range(0, len(x), rows):
        pre = module.pre_activations(x[start : start + rows])
        activation = module.activation(pre)
        activation[: max(0, module.config.leading_positions - start)] = 0
        position, index = activation.nonzero(as_tuple=True)
        parts.append((position + start, index, activation[position, index], pre[position, index]))
    position, index, activation, pre = (torch.cat(column) for column in zip(*parts, strict=True))
    return position, index, activation, pre


def _subtract(
    errors: list[Tensor], features: LayerFeatures, module: Transcoder | CrossLayerPart
) -> None:
    """Subtract what the features write from the errors of the layers they write to."""
    table = module.W_dec.detach()
    for part in torch.arange(len(features)).to(table.device).split(WRITTEN_AT_A_TIME):
        written = table[features.index[part]] * features.activation[part].view(
            -1, *[1] * (table.dim() - 1)
        )
        for j, target in enumerate(features.targets):
            vectors = written[:, j] if table.dim() == 3 else written
            errors[target].index_add_(0, features.position[part], vectors, alpha=-1)
