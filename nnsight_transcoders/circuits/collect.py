"""Run the model once and keep what the frozen linear model needs: forward reads in one trace.

Nothing here needs gradients. Every value is cloned as it passes, since some models go on to change
it in place (Falcon adds attention's output into the MLP's).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from nnsight.intervention.interleaver import OutOfOrderError
from torch import Tensor, nn

from nnsight_transcoders.errors import InputError, SiteError
from nnsight_transcoders.models import hf_module
from nnsight_transcoders.sites import Sites


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
            values = _trace(model, sites, ids, list(positions))
        except OutOfOrderError as error:
            raise SiteError(
                f"the model's parts do not run in the order that its sites say: {error}. Pass "
                "parallel= or the parts' paths to resolve_sites"
            ) from error
    for layer, pattern in enumerate(values["pattern"]):
        expected = (sites.n_heads, len(token_ids), len(token_ids))
        if pattern is None or tuple(pattern.shape) != expected:
            found = None if pattern is None else tuple(pattern.shape)
            raise SiteError(
                f"{sites.layers[layer].attention} returned an attention pattern of shape {found}, "
                f"expected {expected}: this attention cannot be written as a frozen pattern"
            )
    return Run(token_ids=token_ids, **values)


def _trace(model: Any, sites: Sites, ids: Tensor, positions: list[int]) -> dict[str, Any]:
    # One function, read by nnsight as source: the block below runs inside the forward pass.
    n_positions = ids.shape[1]
    with model.trace(ids):
        names = ("resid", "pattern", "attended", "mid", "mlp_in", "mlp_out", "mlp_post")
        values: dict[str, Any] = nnsight.save({name: [] for name in names})
        token = model.get(sites.embed).output.clone()
        position = None
        if sites.position_embed is not None:
            position = model.get(sites.position_embed).output.clone().reshape(n_positions, -1)
        for layer in sites.layers:
            resid = model.get(layer.block).input.clone()[0]
            values["resid"].append(resid)
            values["attended"].append(model.get(layer.out_proj).output.clone()[0])
            outputs = model.get(layer.attention).output
            pattern = outputs[1] if isinstance(outputs, tuple) and len(outputs) > 1 else None
            values["pattern"].append(None if pattern is None else pattern[0].clone())
            if sites.parallel:
                mid = resid
            elif layer.mlp_norm is not None:
                mid = model.get(layer.mlp_norm).input.clone().reshape(n_positions, -1)
            else:
                mid = None
            mlp_in = model.get(layer.mlp_in).input.clone().reshape(n_positions, -1)
            values["mid"].append(mlp_in if mid is None else mid)
            values["mlp_in"].append(mlp_in)
            mlp_out = model.get(layer.mlp_out).output
            if isinstance(mlp_out, tuple):
                mlp_out = mlp_out[0]
            mlp_out = mlp_out.clone().reshape(n_positions, -1)
            values["mlp_out"].append(mlp_out)
            if layer.mlp_post_norm is not None:
                post = model.get(layer.mlp_post_norm).output.clone()
                values["mlp_post"].append(post.reshape(n_positions, -1))
            else:
                values["mlp_post"].append(mlp_out)
        values["final"] = model.get(sites.final_norm).input.clone()[0]
        values["logits"] = model.get(sites.unembed).output[0, positions].clone()
        capped = model.output.logits[0, positions]
        values["probabilities"] = capped.float().softmax(-1)
        # Where nothing else is added to the token embedding, the block's input is the token's
        # whole contribution: it includes what the model does to it (Gemma's scale, Bloom's norm).
        values["embedding"] = values["resid"][0] if position is None else token[0]
        values["position_embedding"] = position
    return values
