"""The real model under interventions on features: one traced batch, a row per intervention.

The MLPs are the model's own: a feature that is set to ``v`` where it would be ``a`` adds
``(v - a)`` times its decoder row to the output (of every layer that it writes to), so that without
interventions nothing changes. The batch's first row has none; it is what the others are compared
with, and what held layers keep.

With attention frozen, each part that attention and norms make of the residual stream is replaced
by what the frozen model (``linear.py``) makes of it, at the patterns and denominators of the
original run. What is left to respond is the MLPs.

Legend: B rows, T positions, D d_model, F d_transcoder, n features that are read off or set.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import nnsight
import torch
from torch import Tensor, nn

from nnsight_transcoders.norms import NormSpec, probed_spec
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites
from nnsight_transcoders.transcoder import sparse_decode

from .collect import collect
from .freeze import attribution_dtype, freeze, freeze_norms, mlp_sides
from .linear import FrozenModel, FrozenNorm


@dataclass(frozen=True)
class Settings:
    """Feature values to set in one layer; each ``(n,)``.

    Attributes:
        row: Which row of the batch.
        position: Where.
        index: Which feature.
        factor: What its value in the first row is multiplied by.
    """

    row: Tensor
    position: Tensor
    index: Tensor
    factor: Tensor

    def to(self, device: torch.device) -> Settings:
        """The same on another device."""
        return Settings(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(frozen=True)
class Frozen:
    """The frozen parts of a run.

    Attributes:
        model: Attention and the norms around it.
        norms: All norms by module path.
    """

    model: FrozenModel
    norms: Mapping[str, FrozenNorm]


@dataclass(frozen=True)
class Outcome:
    """What a batch gave.

    Attributes:
        activations: Layer -> ``(B, n)`` of the features asked for: as set, or as computed.
        logits: ``(B, V)`` at the position asked for, before soft-capping.
        probabilities: ``(B, V)`` there.
        final: ``(B, D)`` what the unembedding reads there.
    """

    activations: dict[int, Tensor]
    logits: Tensor
    probabilities: Tensor
    final: Tensor


def freeze_run(
    model: Any, module: nn.Module, sites: Sites, token_ids: Tensor, transcoders: TranscoderSet
) -> Frozen:
    """Run the prompt once and keep its patterns and denominators.

    Raises:
        SiteError: The model's attention cannot be written down.
    """
    run = collect(model, sites, token_ids)
    norms = freeze_norms(module, sites, run)
    frozen = freeze(module, sites, run, norms, mlp_sides(sites, run, norms, transcoders))
    return Frozen(frozen, norms)


class InterventionRun:
    """Runs batches of interventions on one prompt.

    Args:
        model: An nnsight model.
        module: Its Hugging Face module.
        sites: Its sites.
        transcoders: The set.
        frozen: From ``freeze_run``, or None to let attention and norms respond.
        pinned: Layers whose features and errors are held at those of the first row.
        follow: Layers whose errors are held, while their features follow what they read.
        wanted: Layer -> positions and indices ``(n,)`` of the features to read off.
        position: Where the logits are read.
    """

    def __init__(
        self,
        model: Any,
        module: nn.Module,
        sites: Sites,
        transcoders: TranscoderSet,
        *,
        frozen: Frozen | None,
        pinned: Collection[int],
        follow: Collection[int],
        wanted: Mapping[int, tuple[Tensor, Tensor]],
        position: int,
    ) -> None:
        self.model, self.sites, self.transcoders = model, sites, transcoders
        self.frozen, self.pinned, self.follow = frozen, set(pinned), set(follow) - set(pinned)
        self.held = self.pinned | self.follow
        self.wanted, self.position = wanted, position
        parameter = next(module.parameters())
        self.dtype, self.device = attribution_dtype(parameter.dtype), parameter.device
        self._n0: dict[int, NormSpec] = {}
        for layer in transcoders.layers:
            path = sites.layers[layer].mlp_norm
            if transcoders.config(layer).input_site == "N0" and path is not None:
                self._n0[layer] = probed_spec(module, path, sites.d_model)

    def run(self, ids: Tensor, settings: Mapping[int, Settings]) -> Outcome:
        """One batch.

        Args:
            ids: ``(B, T)``, the same prompt in each row.
            settings: Layer -> what to set; nothing in the first row.
        """
        ids = ids.to(self.device)
        with torch.no_grad():
            saved = _trace(self, ids, settings)
        return Outcome(**saved)

    # -- inside the trace ------------------------------------------------------------------------

    def step(
        self, layer: int, settings: Settings | None, deltas: dict[int, Tensor], shape: Sequence[int]
    ) -> Tensor | None:
        """One block: freeze what is frozen, set features, change the MLP's output.

        Returns:
            The wanted features' activations ``(B, n)``.
        """
        here, model = self.sites.layers[layer], self.model
        resid = model.get(here.block).input
        self._freeze_attention(layer, resid)
        if self.sites.parallel:
            mid = resid
        elif here.mlp_norm is not None:
            mid = model.get(here.mlp_norm).input.reshape(shape)
        else:
            mid = model.get(here.mlp_in).input.reshape(shape)
        mlp_in = self._mlp_input(layer, mid)
        found = None
        held = layer in self.held and layer in self.transcoders
        if settings is not None or layer in self.wanted or held:
            found = self._set_features(layer, self._site(layer, mid, mlp_in), settings, deltas)
        self._change_output(layer, deltas.pop(layer, None), shape)
        return found

    def _freeze_attention(self, layer: int, resid: Tensor) -> None:
        if self.frozen is None:
            return
        here, part = self.sites.layers[layer], self.frozen.model.layers[layer]
        x = resid.to(self.dtype)
        x = x if part.attention_norm is None else part.attention_norm.forward(x)
        attended = part.attention.forward(x)
        self.model.get(here.out_proj).output = attended.to(resid.dtype)
        if part.attention_post_norm is not None:
            out = part.attention_post_norm.forward(attended)
            self.model.get(here.attention_post_norm).output = out.to(resid.dtype)

    def _mlp_input(self, layer: int, mid: Tensor) -> Tensor:
        here = self.sites.layers[layer]
        node = self.model.get(here.mlp_in)
        if self.frozen is None or here.mlp_norm is None:
            return node.input.reshape(mid.shape)
        mlp_in = self.frozen.norms[here.mlp_norm].forward(mid.to(self.dtype))
        node.input = mlp_in.to(mid.dtype).reshape(node.input.shape)
        return mlp_in

    def _site(self, layer: int, mid: Tensor, mlp_in: Tensor) -> Tensor:
        """What the transcoder reads."""
        site = self.transcoders.config(layer).input_site
        if site == "N1":
            return mlp_in.to(self.dtype)
        if site == "R":
            return mid.to(self.dtype)
        read = None if self.frozen is None else self.frozen.model.layers[layer].read
        mid = mid.to(self.dtype)
        return self._n0[layer].normalise(mid) if read is None else read.forward(mid)

    def _set_features(
        self, layer: int, x: Tensor, settings: Settings | None, deltas: dict[int, Tensor]
    ) -> Tensor | None:
        """Encode ``x``, set what is to be set, and add what changed to ``deltas``."""
        module = self.transcoders.load(layer, dtype=self.dtype).to(x.device)
        computed = module.activation(module.pre_activations(x))
        computed[:, : module.config.leading_positions] = 0
        acts, at = computed, None
        if settings is not None:
            here = settings.to(x.device)
            at = (here.row, here.position, here.index)
            acts = computed.clone()
            acts[at] = here.factor.to(self.dtype) * computed[0, here.position, here.index]
        if layer in self.follow:
            self._add(layer, module, acts - computed[:1], deltas)
        elif at is not None:
            # Where the features are held, against what is held; else against what the row's own
            # MLP answers to.
            change = torch.zeros_like(acts)
            change[at] = (acts - (computed[:1] if layer in self.pinned else computed))[at]
            self._add(layer, module, change, deltas)
        if layer in self.held and module.W_skip is not None:
            skipped = torch.nn.functional.linear(x - x[:1], module.W_skip)
            deltas[layer] = deltas.get(layer, 0) + skipped
        if layer not in self.wanted:
            return None
        positions, indices = (t.to(x.device) for t in self.wanted[layer])
        return acts[:, positions, indices].clone()

    def _add(self, layer: int, module: Any, change: Tensor, deltas: dict[int, Tensor]) -> None:
        """Add what changed features ``(B, T, F)`` write to the outputs of all layers they do."""
        targets = self.transcoders.targets(layer)
        for j, target in enumerate(targets):
            table = module.W_dec.detach().reshape(-1, self.sites.d_model)
            written = sparse_decode(change, table, stride=len(targets), offset=j)
            deltas[target] = deltas.get(target, 0) + written

    def _change_output(self, layer: int, delta: Tensor | None, shape: Sequence[int]) -> None:
        here, model = self.sites.layers[layer], self.model
        has_set = layer in self.transcoders
        before_norm = not has_set or self.transcoders.config(layer).output_site == "O"
        node = model.get(here.mlp_out)
        output = node.output
        y, *others = output if isinstance(output, tuple) else (output,)
        out = y.reshape(shape)
        if here.mlp_post_norm is None or before_norm:
            out = self._changed(out, layer, delta)
            changed = out.to(y.dtype).reshape(y.shape)
            node.output = (changed, *others) if others else changed
        if here.mlp_post_norm is None:
            return  # sites O and O' are one
        node = model.get(here.mlp_post_norm)
        if self.frozen is None:
            written = node.output
        else:
            written = self.frozen.norms[here.mlp_post_norm].forward(out.to(self.dtype))
        if not before_norm:
            written = self._changed(written.reshape(shape), layer, delta)
        node.output = written.to(y.dtype).reshape(y.shape)

    def _changed(self, y: Tensor, layer: int, delta: Tensor | None) -> Tensor:
        y = y.to(self.dtype)
        if layer in self.held:
            y = y[:1].expand_as(y)
        return y.clone() if delta is None else y + delta.to(y.device)

    def freeze_final(self) -> None:
        """The last norm at its denominators."""
        if self.frozen is not None:
            node = self.model.get(self.sites.final_norm)
            x = node.input
            node.output = self.frozen.model.final_norm.forward(x.to(self.dtype)).to(x.dtype)


def _trace(run: InterventionRun, ids: Tensor, settings: Mapping[int, Settings]) -> dict[str, Any]:
    # One function, read by nnsight as source: the block below runs inside the forward pass.
    model, sites = run.model, run.sites
    shape = (*ids.shape, sites.d_model)
    with model.trace(ids):
        saved: dict[str, Any] = nnsight.save({"activations": {}})
        deltas: dict[int, Tensor] = {}
        for layer in range(len(sites.layers)):
            found = run.step(layer, settings.get(layer), deltas, shape)
            if found is not None:
                saved["activations"][layer] = found
        run.freeze_final()
        saved["final"] = model.get(sites.unembed).input[:, run.position].to(run.dtype)
        saved["logits"] = model.get(sites.unembed).output[:, run.position].to(run.dtype)
        saved["probabilities"] = model.output.logits[:, run.position].to(run.dtype).softmax(-1)
    return saved
