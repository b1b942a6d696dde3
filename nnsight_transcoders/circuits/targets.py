"""What a graph explains: the likely next tokens, named tokens, or any direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnsight_transcoders.errors import InputError
from nnsight_transcoders.sites import Sites

from .collect import Run, token_texts
from .freeze import logit_directions
from .model_weights import ModelWeights

#: A token as text or id, or a named direction ``(d_model,)`` in the unembedding's space.
Target = str | int | tuple[str, Tensor]


@dataclass(frozen=True)
class TargetSpec:
    """The targets of a graph; G targets, D d_model.

    Attributes:
        names: Their text.
        index: ``(G,)`` vocabulary ids; -1, -2, ... for directions.
        direction: ``(G, D)`` after the final norm; demeaned over the vocabulary for tokens.
        bias: ``(G,)`` the unembedding's own bias, demeaned; zero for directions.
        total: ``(G,)`` what each row must sum to: the demeaned logit, or the direction's value.
        value: ``(G,)`` what the node shows: the logit, or the direction's value.
        probability: ``(G,)`` the model's probability; zero for directions.
    """

    names: tuple[str, ...]
    index: Tensor
    direction: Tensor
    bias: Tensor
    total: Tensor
    value: Tensor
    probability: Tensor

    @property
    def weight(self) -> Tensor:
        """``(G,)`` with which influence starts: the probabilities, or equal shares."""
        if self.probability.sum() > 0:
            return self.probability
        return torch.full_like(self.total, 1 / len(self.names))


def choose_targets(
    model: Any,
    module: nn.Module | ModelWeights | None,
    sites: Sites,
    run: Run,
    final: Tensor,
    targets: Sequence[Target] | None,
    max_n_logits: int,
    desired_logit_prob: float,
) -> TargetSpec:
    """Resolve ``attribute``'s ``targets`` argument.

    Args:
        model: The nnsight model, for its tokenizer.
        module: The Hugging Face module, or where else its unembedding is; None leaves the
            directions of tokens zero, to be filled in where the unembedding is.
        sites: Its sites.
        run: The run, with logits at the targets' position.
        final: ``(D,)`` the final norm's output at that position, in the attribution's dtype.
        targets: See ``attribute``.
        max_n_logits: See ``attribute``.
        desired_logit_prob: See ``attribute``.

    Raises:
        InputError: An empty list, a text that is not one token, an id outside the vocabulary, or a
            direction of the wrong width.
    """
    if targets is None:
        tokens = likely_tokens(run.probabilities[0], max_n_logits, desired_logit_prob)
        return _tokens(model, module, sites, run, tokens.tolist(), final.dtype)
    if named := _named(targets):
        return _directions(named, final)
    ids = [_token_id(model, sites, t) for t in targets if not isinstance(t, tuple)]
    return _tokens(model, module, sites, run, ids, final.dtype)


def check_targets(
    model: Any,
    sites: Sites,
    targets: Sequence[Target] | None,
    max_n_logits: int,
    desired_logit_prob: float,
) -> None:
    """Check targets before there is a run: what ``choose_targets`` would refuse then.

    Raises:
        InputError: See ``choose_targets`` and ``likely_tokens``.
    """
    if targets is None:
        likely_tokens(torch.ones(1), max_n_logits, desired_logit_prob)
    elif named := _named(targets):
        _directions(named, torch.zeros(sites.d_model))
    else:
        for target in targets:
            if not isinstance(target, tuple):
                _token_id(model, sites, target)


def _named(targets: Sequence[Target]) -> list[tuple[str, Tensor]]:
    if not len(targets):
        raise InputError("targets is empty: leave it out for the likely next tokens")
    named = [t for t in targets if isinstance(t, tuple)]
    if named and len(named) < len(targets):
        raise InputError("targets must be all tokens or all (name, direction) pairs")
    return named


def likely_tokens(probabilities: Tensor, max_n_logits: int, desired: float) -> Tensor:
    """The fewest most likely tokens whose probabilities ``(V,)`` reach ``desired``: ids ``(n,)``.

    Raises:
        InputError: ``max_n_logits`` below 1, or ``desired`` outside (0, 1].
    """
    if max_n_logits < 1:
        raise InputError(f"max_n_logits must be at least 1, got {max_n_logits}")
    if not 0 < desired <= 1:
        raise InputError(f"desired_logit_prob must be above 0 and at most 1, got {desired}")
    top = probabilities.topk(min(max_n_logits, len(probabilities)))
    before = top.values.cumsum(0) - top.values
    return top.indices[before < desired]


def _tokens(
    model: Any,
    module: nn.Module | ModelWeights | None,
    sites: Sites,
    run: Run,
    ids: list[int],
    dtype: torch.dtype,
) -> TargetSpec:
    index = torch.tensor(ids, device=run.final.device)
    if module is None:
        direction = torch.zeros(len(ids), sites.d_model, dtype=dtype, device=index.device)
        bias = direction[:, 0]
    else:
        direction, bias = logit_directions(module, sites, index, dtype)
    logits = run.logits[0].to(dtype)
    return TargetSpec(
        names=token_texts(model, index),
        index=index,
        direction=direction,
        bias=bias,
        total=logits[index] - logits.mean(),
        value=logits[index],
        probability=run.probabilities[0][index].to(dtype),
    )


def _directions(named: Sequence[tuple[str, Tensor]], final: Tensor) -> TargetSpec:
    for name, vector in named:
        if tuple(vector.shape) != tuple(final.shape):
            raise InputError(
                f"direction {name!r} has shape {tuple(vector.shape)}, expected {tuple(final.shape)}"
            )
    direction = torch.stack([vector.detach().to(final) for _, vector in named])
    value = direction @ final
    return TargetSpec(
        names=tuple(name for name, _ in named),
        index=-1 - torch.arange(len(named), device=final.device),
        direction=direction,
        bias=torch.zeros_like(value),
        total=value,
        value=value,
        probability=torch.zeros_like(value),
    )


def _token_id(model: Any, sites: Sites, target: str | int) -> int:
    if isinstance(target, int):
        if not 0 <= target < sites.vocab_size:
            raise InputError(
                f"target token id {target} is outside the vocabulary (0 to {sites.vocab_size - 1})"
            )
        return target
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise InputError("this model has no tokenizer: give targets as token ids")
    ids = tokenizer(target, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(
            f"target {target!r} is {len(ids)} tokens {tokenizer.convert_ids_to_tokens(ids)}; "
            "a target is one token (mind the leading space)"
        )
    return ids[0]
