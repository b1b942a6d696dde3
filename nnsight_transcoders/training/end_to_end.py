"""Training through the model: the loss is what the model predicts with all layers replaced.

The transcoders are attached with their own trainable weights, so that one backward pass through the
nnsight model reaches them; the model's weights are frozen meanwhile. Thresholds (JumpReLU,
BatchTopK) and the choice of the top k stay as they are in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import nnsight
import torch
from torch import Tensor, nn

from nnsight_transcoders.attachment.edit import attach
from nnsight_transcoders.models import hf_module
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites

from .buffer import TokenBatches
from .group import LayerStats
from .held_out import logits_of, next_token_loss
from .objectives import l1_penalty, tanh_penalty
from .step import Learner, sparsity_weight


class EndToEndSteps:
    """Steps whose loss is the cross-entropy, or the divergence from the model's own predictions.

    Args:
        model: An nnsight model, here.
        sites: Its sites.
        batches: Token ids.
        learner: Its group holds the transcoders of all layers, in the model's units.
    """

    def __init__(self, model: Any, sites: Sites, batches: TokenBatches, learner: Learner) -> None:
        self._model, self._batches, self.learners = model, iter(batches), [learner]
        self._rows, self._group = batches.rows, learner.group
        self._config = learner.config
        parts = {layer: self._group.part(layer) for layer in self._group.layers}
        self._replaced = attach(model, TranscoderSet.from_transcoders(parts), sites=sites)

    def step(self, number: int) -> tuple[float, dict[int, LayerStats]] | None:
        """See ``Steps``."""
        found = next(self._batches, None)
        if found is None:
            return None
        ids, kept = found
        logits, features = _run(self._replaced, self._group.layers, ids)
        loss = self._objective(logits, ids, kept)
        named = dict(zip(self._group.layers, features, strict=True))
        kept_features = {n: acts[kept.to(acts.device)] for n, acts in named.items()}
        total = loss + sparsity_weight(number, self._config) * self._penalty(kept_features)
        learner = self.learners[0]
        learner.check(total, number, "loss")
        total.backward()
        learner.update(number)
        stats = {n: _stats(acts.detach()) for n, acts in kept_features.items()}
        for layer, seen in stats.items():
            self._group.observe(layer, seen.fired, None, len(kept_features[layer]))
        return float(loss.detach()), stats

    def _objective(self, logits: Tensor, ids: Tensor, kept: Tensor) -> Tensor:
        if self._config.objective == "ce":
            loss, n = next_token_loss(logits, ids, kept)
            return loss / max(n, 1)
        clean = logits_of(self._model, ids)
        chosen = kept.to(logits.device)
        return divergence(clean[chosen], logits[chosen])

    def _penalty(self, features: Mapping[int, Tensor]) -> Tensor | float:
        c = self._config
        if c.penalty not in ("l1", "tanh"):
            return 0.0
        total: Tensor | float = 0.0
        for layer, acts in features.items():
            part = self._group.part(layer)
            weights = torch.ones_like(part.b_enc)
            if c.decoder_norm == "weighted":
                weights = part.W_dec.flatten(1).norm(dim=1)
            if c.penalty == "tanh":
                total = total + tanh_penalty(acts, weights, c.tanh_scale, len(acts))
            else:
                total = total + l1_penalty(acts, weights, len(acts))
        return total

    def state(self) -> dict[str, Any]:
        """See ``Steps``."""
        return self._rows.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """See ``Steps``."""
        self._rows.restore(state)


def divergence(clean: Tensor, logits: Tensor) -> Tensor:
    """Mean KL(clean || logits) of ``(n, vocabulary)``, in nats."""
    old, new = clean.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (old.exp() * (old - new)).sum(-1).mean()


def _run(replaced: Any, layers: tuple[int, ...], ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    with replaced.trace(ids):
        features = nnsight.save([])
        for layer in layers:
            features.append(replaced.transcoders[layer].features.output)
        logits = replaced.output.logits.save()
    return logits, features


def _stats(acts: Tensor) -> LayerStats:
    active = acts > 0
    return LayerStats(None, active.sum() / len(acts), active.any(0), None)


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No gradients for the model's own weights within the block."""
    module: nn.Module = hf_module(model)
    before = [p.requires_grad for p in module.parameters()]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, wanted in zip(module.parameters(), before, strict=True):
            parameter.requires_grad_(wanted)
