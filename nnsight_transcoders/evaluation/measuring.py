"""``evaluate``: what a transcoder set is worth, in the numbers that the field compares.

All numbers are means over the same positions: padding, special tokens and the leading positions
that a set was not trained on are left out (the same ones of every layer and of both sets, where two
are compared).

    L0        = mean number of active features per position
    FVU       = sum |y - y_hat|^2 / sum |y - mean y|^2      y: the MLP's output
    CE change = CE of the next token with MLPs replaced - CE of the model itself, in nats
    KL        = mean over positions of KL(model || model with MLPs replaced), in nats
    recovered = (CE_ablated - CE_replaced) / (CE_ablated - CE_model)

with the same outputs ablated to zero or to their mean over the text. A first pass over the text
measures features. A second one runs, batch by batch, the model and every replaced variant of it, so
that two batches' logits at most are in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from nnsight_transcoders.attachment.edit import attached
from nnsight_transcoders.attachment.replacement import check_layerwise
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.models import hf_module, hub_name
from nnsight_transcoders.remote.server import Remote
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites, resolve_sites

from .batch_runs import BatchRuns
from .layer_sums import LayerSums
from .report import Evaluation, LayerEvaluation, ReplacementEffect
from .token_batches import (
    TokenBatch,
    default_context,
    padded_batches,
    special_token_ids,
    token_pieces,
)
from .variants import Variant, on_device_of, set_variants


def evaluate(
    model: Any,
    transcoders: TranscoderSet,
    data: Any,
    *,
    baseline: TranscoderSet | None = None,
    each_layer: bool = True,
    context: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = 65_536,
    dense_above: float = 0.1,
    special_ids: Collection[int] | None = None,
    sites: Sites | None = None,
    remote: Remote = False,
    verbose: bool = False,
) -> Evaluation:
    """Measure a transcoder set on a text: see ``Evaluation``, and the module for the formulas.

    Args:
        model: An nnsight model.
        transcoders: The set.
        data: As ``train`` takes it (texts or token ids, a data set, a file or folder of text, or
            ``"builtin"``), or a tokenizer's padded output. Long texts are cut into pieces.
        baseline: Another set, measured on the same positions, such as an SAE on the MLP's output.
        each_layer: Measure the effect of replacing each layer alone: three runs per layer.
        context: Longest piece, in tokens (default: 128, or the model's limit).
        batch_size: Pieces that run at once.
        max_tokens: Stop after so many tokens of the data; None: at its end.
        dense_above: A feature that is active at more than this share of the positions is dense.
        special_ids: Token ids to leave out (default: the tokenizer's special tokens).
        sites: The model's sites, where they have to be given by hand.
        remote: Run the model on a server: ``True``, its address, or a ``RemoteServer``. The
            weights of the sets are sent with every batch, so let batches be large.
        verbose: Show progress.

    Raises:
        MismatchError: The set does not fit the model.
        InputError: Nothing to measure, or a set whose features are chosen over all layers.
    """
    runs = BatchRuns(model, remote)
    module = hf_module(model, weights=not remote)
    sites = sites or resolve_sites(module)
    if not 0 <= dense_above <= 1:
        raise InputError(f"dense_above is a share of the positions (0 to 1), got {dense_above}")
    sets = [transcoders] if baseline is None else [transcoders, baseline]
    leading = max(_leading(one, sites, type(module).__name__) for one in sets)
    context = default_context(sites) if context is None else context
    batches = padded_batches(
        token_pieces(model, data, sites, context=context, max_tokens=max_tokens),
        batch_size=batch_size,
        special=special_token_ids(model) if special_ids is None else special_ids,
        leading=leading,
    )
    if not remote:
        device = next(module.parameters()).device
        batches = [batch.to(device) for batch in batches]
        sets = [on_device_of(one, module, sites) for one in sets]
    found = _Text(model, sites, batches, runs, verbose).reports(sets, each_layer, dense_above)
    return replace(found[0], baseline=found[1] if len(found) > 1 else None)


def _leading(transcoders: TranscoderSet, sites: Sites, name: str) -> int:
    """How many leading positions a set leaves out, once it is known to fit the model."""
    transcoders.check_model(sites.d_model, sites.n_layers, name)
    check_layerwise(transcoders)
    return max(transcoders.config(layer).leading_positions for layer in transcoders.layers)


@dataclass(frozen=True)
class _Text:
    """The text as batches, and the two passes over it."""

    model: Any
    sites: Sites
    batches: Sequence[TokenBatch]
    runs: BatchRuns
    verbose: bool

    @property
    def n_predictions(self) -> int:
        return sum(int(batch.predicted.sum()) for batch in self.batches)

    def reports(
        self, sets: Sequence[TranscoderSet], each_layer: bool, dense_above: float
    ) -> list[Evaluation]:
        """One report per set."""
        sums = [self.feature_sums(one) for one in sets]
        variants = [
            list(set_variants(one, found, each_layer))
            for one, found in zip(sets, sums, strict=True)
        ]
        means = self.prediction_means(list(chain(*variants)))
        of_set = [{(one.kind, one.layer): means[one] for one in some} for some in variants]
        return [
            _report(self, one, found, effects, means[None], dense_above)
            for one, found, effects in zip(sets, sums, of_set, strict=True)
        ]

    def progress(self, name: str, total: int) -> tqdm:
        return tqdm(desc=name, total=total, disable=not self.verbose, leave=False)

    def feature_sums(self, transcoders: TranscoderSet) -> dict[int, LayerSums]:
        """Layer -> sums of its reconstruction, of the model's own activations."""
        sums = {
            layer: LayerSums(config.d_out, config.d_transcoder)
            for layer, config in ((n, transcoders.config(n)) for n in transcoders.layers)
        }
        progress = self.progress("features", len(self.batches))
        watching = attached(self.model, transcoders, mode="observe", sites=self.sites)
        with watching as watched, progress:
            for batch in self.batches:
                n, found = int(batch.measured.sum()), self.runs.statistics(watched, [*sums], batch)
                for layer, statistics in zip(sums, found, strict=True):
                    sums[layer].add_batch(n, statistics)
                progress.update()
        return sums

    def prediction_means(self, variants: Sequence[Variant]) -> dict[Variant | None, Tensor]:
        """``(3,)`` per variant, see ``prediction_sums``; under None the model's own."""
        total = torch.zeros(1 + len(variants), 3, dtype=torch.float64)
        progress = self.progress("predictions", len(self.batches))
        with ExitStack() as stack, progress:
            edited = [
                (one, stack.enter_context(one.attached(self.model, self.sites))) for one in variants
            ]
            for batch in self.batches:
                total += torch.stack(self.runs.predictions(edited, batch))
                progress.update()
        return dict(zip((None, *variants), total / self.n_predictions, strict=True))


def _report(
    text: _Text,
    transcoders: TranscoderSet,
    sums: Mapping[int, LayerSums],
    means: Mapping[tuple[str, int | None], Tensor],
    own: Tensor,
    dense_above: float,
) -> Evaluation:
    def effect(layer: int | None) -> ReplacementEffect | None:
        if ("replaced", layer) not in means:
            return None
        ce, kl, top1 = means["replaced", layer].tolist()
        zero, mean = (float(means[kind, layer][0] - own[0]) for kind in ("zero", "mean"))
        return ReplacementEffect(ce - float(own[0]), kl, top1, zero, mean)

    together = effect(None)
    assert together is not None
    layers = tuple(
        LayerEvaluation(
            layer=layer,
            d_transcoder=len(found.fired),
            l0=found.l0,
            fvu=found.fvu(),
            dead=found.n_dead(),
            dense=found.n_dense(dense_above),
            alone=together if len(sums) == 1 else effect(layer),
        )
        for layer, found in sums.items()
    )
    module = hf_module(text.model, weights=False)
    return Evaluation(
        model=hub_name(module) or type(module).__name__,
        transcoders=repr(transcoders),
        n_tokens=next(iter(sums.values())).n,
        n_predictions=text.n_predictions,
        ce=float(own[0]),
        dense_above=dense_above,
        layers=layers,
        together=together,
    )
