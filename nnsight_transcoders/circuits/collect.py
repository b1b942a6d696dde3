"""Run the model once and keep what the frozen linear model needs: forward reads in one trace.

Nothing here needs gradients. The reads themselves are in ``reads.py``, which also serves models
that are elsewhere (``remote/``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import nnsight
import torch
from nnsight.intervention.interleaver import OutOfOrderError
from torch import Tensor, nn

from nnsight_transcoders.errors import InputError, SiteError
from nnsight_transcoders.models import hf_module
from nnsight_transcoders.sites import Sites

from .reads import read_run


@dataclass(frozen=True)
class Run:
    """One prompt's values, in the model's dtype; T positions, D d_model, H heads, V vocabulary.

    Attributes:
        token_ids: ``(T,)``.
        embedding: ``(T, D)`` what the token embedding adds to the residual stream.
        position_embedding: ``(T, D)`` the same of a separate position embedding, or None.
        resid: Per layer, the block's input ``(T, D)``.
        pattern: Per layer, the attention pattern ``(H, T, T)``.
        attended: Per layer, the attention's output projection ``(T, D)``.
        mid: Per layer, site R ``(T, D)``.
        mlp_in: Per layer, site N1 ``(T, D)``.
        mlp_out: Per layer, site O ``(T, D)``.
        mlp_post: Per layer, site O' ``(T, D)``, or ``mlp_out`` itself where it is O.
        final: The final norm's input ``(T, D)``.
        logits: The unembedding's output ``(n, V)`` at the positions asked for (not soft-capped).
        probabilities: ``(n, V)`` softmax of the model's own logits (after soft-capping).
    """

    token_ids: Tensor
    embedding: Tensor
    position_embedding: Tensor | None
    resid: list[Tensor]
    pattern: list[Tensor]
    attended: list[Tensor]
    mid: list[Tensor]
    mlp_in: list[Tensor]
    mlp_out: list[Tensor]
    mlp_post: list[Tensor]
    final: Tensor
    logits: Tensor
    probabilities: Tensor

    @property
    def n_positions(self) -> int:
        """T."""
        return int(self.token_ids.shape[0])


def token_ids_of(model: Any, prompt: str | Sequence[int] | Tensor, sites: Sites) -> Tensor:
    """A prompt as token ids ``(T,)``, checked against the model.

    Raises:
        InputError: Empty, longer than the context, or an id outside the vocabulary.
    """
    if isinstance(prompt, str):
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise InputError("this model has no tokenizer: give the prompt as token ids")
        if not prompt:  # a tokenizer may still make a <bos> of it
            raise InputError("the prompt is empty: it needs at least one token")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the prompt is not valid text: {error}") from error
        ids = torch.tensor(tokenizer(prompt)["input_ids"], dtype=torch.long)
    else:
        ids = torch.as_tensor(prompt, dtype=torch.long)
        if ids.dim() == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.dim() != 1:
            raise InputError(
                f"one prompt at a time: token ids must have shape (T,), got {tuple(ids.shape)}"
            )
    if not len(ids):
        raise InputError("the prompt is empty: it needs at least one token")
    if sites.max_positions is not None and len(ids) > sites.max_positions:
        raise InputError(
            f"the prompt has {len(ids)} tokens, but the model takes {sites.max_positions} at most"
        )
    if int(ids.min()) < 0 or int(ids.max()) >= sites.vocab_size:
        bad = int(ids.max()) if int(ids.max()) >= sites.vocab_size else int(ids.min())
        raise InputError(f"token id {bad} is outside the vocabulary (0 to {sites.vocab_size - 1})")
    return ids


def position_in(position: int, length: int) -> int:
    """A position of a prompt, counted from its first token.

    Raises:
        InputError: It is outside the prompt.
    """
    if not -length <= position < length:
        raise InputError(f"position {position} is outside the prompt of {length} tokens")
    return position % length


def token_texts(model: Any, token_ids: Tensor) -> tuple[str, ...]:
    """Each of the token ids ``(T,)`` as text; ``<id>`` without a tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return tuple(f"<{i}>" for i in token_ids.tolist())
    return tuple(tokenizer.decode([i]) for i in token_ids.tolist())


@contextmanager
def eager_attention(module: nn.Module) -> Iterator[None]:
    """Run attention in its eager form, which alone returns the pattern; put back afterwards."""
    configs: dict[int, Any] = {}
    for child in module.modules():
        config = getattr(child, "config", None)
        if hasattr(config, "_attn_implementation"):
            configs[id(config)] = config
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def run_parts(sites: Sites) -> dict[str, Any]:
    """The sites as plain data, for ``reads.read_run``."""
    return asdict(sites)


def collect(model: Any, sites: Sites, token_ids: Tensor, positions: Sequence[int] = (-1,)) -> Run:
    """Trace one prompt and keep every value the frozen model needs.

    Args:
        model: An nnsight model.
        sites: Its sites.
        token_ids: ``(T,)``.
        positions: Where the logits are kept.

    Raises:
        SiteError: The attention module does not hand out its pattern, or a part runs elsewhere
            than the sites say.
    """
    module = hf_module(model)
    ids = token_ids[None].to(next(module.parameters()).device)
    with eager_attention(module), torch.no_grad():
        try:
            values = _trace(model, run_parts(sites), ids, list(positions))
        except OutOfOrderError as error:
            raise SiteError(
                f"the model's parts do not run in the order that its sites say: {error}. Pass "
                "parallel= or the parts' paths to resolve_sites"
            ) from error
    run = Run(token_ids=token_ids, **values)
    check_patterns(run, sites)
    return run


def check_patterns(run: Run, sites: Sites) -> None:
    """Check that every layer handed out its attention pattern.

    Raises:
        SiteError: One did not.
    """
    for layer, pattern in enumerate(run.pattern):
        expected = (sites.n_heads, run.n_positions, run.n_positions)
        if pattern is None or tuple(pattern.shape) != expected:
            found = None if pattern is None else tuple(pattern.shape)
            raise SiteError(
                f"{sites.layers[layer].attention} returned an attention pattern of shape {found}, "
                f"expected {expected}: this attention cannot be written as a frozen pattern"
            )


def _trace(model: Any, parts: dict[str, Any], ids: Tensor, positions: list[int]) -> dict[str, Any]:
    # Read by nnsight as source: the block below runs inside the forward pass.
    with model.trace(ids):
        values: dict[str, Any] = nnsight.save(read_run(model, parts, positions))
    return values
