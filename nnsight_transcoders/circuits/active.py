"""Which features are active on a run, what they reconstruct, and what is left as error.

Layers are loaded one at a time and let go; what is kept of them are the encoder and decoder rows
of the active features. Legend: n active features of a layer, W layers they write to, T positions,
D d_model, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.transcoder import CrossLayerPart, FeatureEncoder, Transcoder

from .collect import Run

#: Active features of one layer: positions, indices, activations, pre-activations, each ``(n,)``.
Sparse = tuple[Tensor, Tensor, Tensor, Tensor]

#: Upper bound on the dense pre-activations held at a time, in elements.
CHUNK_ELEMENTS = 64 * 2**20


@dataclass(frozen=True)
class LayerFeatures:
    """The active features of one layer, by position, then by index.

    Attributes:
        position: ``(n,)``.
        index: ``(n,)`` feature index.
        activation: ``(n,)``.
        pre_activation: ``(n,)``.
        encoder: ``(n, D)`` encoder rows.
        encoder_bias: ``(n,)``.
        decoder: ``(n, W, D)`` decoder rows, one per layer written to.
        targets: The W layers written to.
    """

    position: Tensor
    index: Tensor
    activation: Tensor
    pre_activation: Tensor
    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    targets: tuple[int, ...]

    def __len__(self) -> int:
        return int(self.position.shape[0])


@dataclass(frozen=True)
class ActiveFeatures:
    """All active features of a run, and the error each layer's output is left with.

    Attributes:
        layers: Layer -> its features, for the layers that have a transcoder.
        bias: Per layer, the decoder's bias ``(D,)``, or None without a transcoder.
        error: Per layer ``(T, D)`` at the layer's output site: output minus reconstruction; the
            whole output where there is no transcoder.
        output: Per layer ``(T, D)`` the output-site value.
    """

    layers: dict[int, LayerFeatures]
    bias: list[Tensor | None]
    error: list[Tensor]
    output: list[Tensor]


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
    verbose: bool = False,
) -> ActiveFeatures:
    """Encode a run layer by layer.

    Args:
        run: What ``collect`` kept.
        transcoders: The set.
        inputs: Per layer, the input-site value ``(T, D)`` in ``dtype``.
        dtype: In which everything is computed and kept.
        verbose: Show progress.
    """
    n_layers = len(run.resid)
    outputs = [output_site(run, layer, transcoders).to(dtype) for layer in range(n_layers)]
    errors = [output.clone() for output in outputs]
    biases: list[Tensor | None] = [None] * n_layers
    layers = {}
    chosen = chosen_jointly(run, transcoders, inputs, dtype)
    for layer in tqdm(transcoders.layers, desc="features", disable=not verbose, leave=False):
        module = transcoders.load(layer, dtype=dtype).to(run.final.device)
        with torch.no_grad():
            sparse = chosen.get(layer) or sparse_encode(module, inputs[layer])
            layers[layer] = _layer_features(module, layer, sparse)
            biases[layer] = module.b_dec.detach()
            errors[layer] -= module.b_dec + module.skip(inputs[layer])
            _subtract(errors, layers[layer])
    return ActiveFeatures(layers, biases, errors, outputs)


def _layer_features(
    module: Transcoder | CrossLayerPart, layer: int, sparse: Sparse
) -> LayerFeatures:
    position, index, activation, pre = sparse
    decoder = module.W_dec.detach()[index]
    if isinstance(module, Transcoder):
        decoder, targets = decoder[:, None], (layer,)
    else:
        targets = module.targets
    return LayerFeatures(
        position=position,
        index=index,
        activation=activation,
        pre_activation=pre,
        encoder=module.W_enc.detach()[index],
        encoder_bias=module.b_enc.detach()[index],
        decoder=decoder,
        targets=targets,
    )


def chosen_jointly(
    run: Run, transcoders: TranscoderSet, inputs: Sequence[Tensor], dtype: torch.dtype
) -> dict[int, Sparse]:
    """Layer -> active features, where they are chosen over all layers together; else nothing.

    A pass of its own, so that decoder rows are only gathered of the features that stay. No layer
    can contribute more than k features to a position, so no more than those are held per layer.
    """
    config = transcoders.config(transcoders.layers[0])
    if config.activation != "jointtopk" or config.k is None:
        return {}
    found, scores = {}, {}
    for layer in transcoders.layers:
        module = transcoders.load(layer, dtype=dtype).to(run.final.device)
        with torch.no_grad():
            sparse = sparse_encode(module, inputs[layer])
            score = sparse[2] * module.decoder_norms()[sparse[1]]
        kept = largest_per_position(sparse[0], score, config.k)
        found[layer], scores[layer] = _masked(sparse, kept), score[kept]
    positions = torch.cat([sparse[0] for sparse in found.values()])
    kept = largest_per_position(positions, torch.cat(list(scores.values())), config.k)
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


def _subtract(errors: list[Tensor], features: LayerFeatures) -> None:
    """Subtract what the features write from the errors of the layers they write to."""
    for j, target in enumerate(features.targets):
        written = features.decoder[:, j] * features.activation[:, None]
        errors[target].index_add_(0, features.position, written, alpha=-1)
