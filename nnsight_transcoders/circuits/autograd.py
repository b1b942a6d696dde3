"""The same edges by differentiating the model itself: the operator's oracle, and its fallback.

One trace runs the model with everything frozen *in place*: attention patterns are overwritten with
the recorded ones, norms with themselves at the recorded denominators, MLP outputs and the embedding
with leaves that require gradients. The values that reach the input sites are then differentiated.
Nothing of ``linear.py``'s reading of attention is used, so agreement of the two is evidence; and an
attention variant that cannot be written as pattern x values x output still works here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from torch import Tensor, nn

from nnsight_transcoders.blocks import LayerSites
from nnsight_transcoders.errors import SiteError
from nnsight_transcoders.norms import NormSpec, probed_spec
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites

from .active import output_site
from .collect import Run, eager_attention
from .edges import SiteSources, Sources
from .freeze import MlpSide, attribution_dtype, freeze_norms, input_values, mlp_sides
from .linear import EMBEDDING, FrozenNorm, Targets

# The calls that compute attention in Hugging Face's modules, where it is not written inline.
_ATTENTION_CALLS = ("attention_interface_1", "self__attn_0")


class AutogradEngine:
    """Edges and constant terms by autograd (see ``candidates.Engine``).

    Holds the computation graph of one forward pass until it is let go.

    Args:
        model: The nnsight model.
        module: The Hugging Face module inside it.
        sites: Its sites.
        run: What ``collect`` kept.
        transcoders: The set.
    """

    def __init__(
        self, model: Any, module: nn.Module, sites: Sites, run: Run, transcoders: TranscoderSet
    ) -> None:
        norms = freeze_norms(module, sites, run)
        sides = mlp_sides(sites, run, norms, transcoders)
        self.dtype = attribution_dtype(run.final.dtype)
        self.inputs = input_values(run, sides)
        self.final = norms[sites.final_norm].forward(run.final.to(self.dtype))
        self._model, self._module, self._sites, self._run = model, module, sites, run
        self._final_norm = norms[sites.final_norm]
        self._plans = [
            _plan(module, layer, side, norms, pattern)
            for layer, side, pattern in zip(sites.layers, sides, run.pattern, strict=True)
        ]
        self._inner_scales: dict[str, Tensor] = {}
        self._start = run.resid[0].detach().clone().requires_grad_()
        self._leaves = []
        for number, side in enumerate(sides):
            leaf = output_site(run, number, transcoders).to(self.dtype)
            if side.skip is not None:
                leaf = leaf - self.inputs[number] @ side.skip.T
            self._leaves.append(leaf.to(run.final.dtype).detach().requires_grad_())
        self._reads = self._run_frozen(self._start, self._leaves, grad=True)

    def constants(self, biases: Sequence[Tensor | None]) -> tuple[list[Tensor], Tensor]:
        """See ``candidates.Engine.constants``: a second pass whose leaves hold only biases."""
        start = torch.zeros_like(self._start)
        if self._run.position_embedding is not None:
            start = start + self._run.position_embedding
        leaves = [
            torch.zeros_like(leaf) if bias is None else bias.to(leaf.dtype).expand_as(leaf)
            for bias, leaf in zip(biases, self._leaves, strict=True)
        ]
        *reads, final = self._run_frozen(start, leaves, grad=False)
        return [read.to(self.dtype) for read in reads], final.to(self.dtype)

    def token_sources(self, vectors: Tensor, first_column: int) -> dict[int, list[SiteSources]]:
        """See ``candidates.Engine.token_sources``."""
        return {EMBEDDING: [SiteSources.everywhere(vectors, first_column)]}

    def rows(self, sources: Sources, targets: Targets, n_columns: int) -> Tensor:
        """See ``candidates.Engine.rows``."""
        out = targets.vector.new_zeros(len(targets.layer), n_columns)
        leaves = [*self._leaves, self._start]
        sites = [*range(len(self._leaves)), -1]
        for layer in targets.layer.unique().tolist():
            here = (targets.layer == layer).nonzero().flatten()
            read = self._reads[layer]
            cotangent = read.new_zeros(len(here), *read.shape)
            position = targets.position[here]
            cotangent[torch.arange(len(here)), position] = targets.vector[here].to(read.dtype)
            grads = torch.autograd.grad(
                read,
                leaves,
                cotangent,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
            for site, grad in zip(sites, grads, strict=True):
                for part in sources.get(site, ()) if grad is not None else ():
                    columns, edges = part.read_off(grad.to(self.dtype))
                    out[here[:, None], columns] += edges
        return out

    def _run_frozen(self, start: Tensor, leaves: Sequence[Tensor], *, grad: bool) -> list[Tensor]:
        """Input-site values ``(T, D)`` of all layers and the final norm's output."""
        ids = self._run.token_ids[None].to(start.device)
        with eager_attention(self._module), torch.set_grad_enabled(grad):
            return _trace_frozen(
                self._model,
                self._sites,
                ids,
                start,
                leaves,
                self._plans,
                self._final_norm,
                self._inner_scales,
            )


@dataclass(frozen=True)
class _Plan:
    """What is overwritten in one block."""

    sites: LayerSites
    side: MlpSide
    norms: tuple[tuple[str, FrozenNorm], ...]
    inner: tuple[tuple[str, NormSpec], ...]
    pattern: Tensor
    written: str


def _plan(
    module: nn.Module,
    layer: LayerSites,
    side: MlpSide,
    norms: Mapping[str, FrozenNorm],
    pattern: Tensor,
) -> _Plan:
    # The output is replaced where it enters the stream; a norm after that site stays in the path.
    written = layer.mlp_out if side.write or not layer.mlp_post_norm else layer.mlp_post_norm
    paths = [layer.attention_norm, layer.attention_post_norm, layer.mlp_norm]
    if side.write:
        paths.append(layer.mlp_post_norm)
    kept = tuple((path, norms[path]) for path in dict.fromkeys(paths) if path is not None)
    return _Plan(layer, side, kept, _inner_norms(module, layer.attention), pattern, written)


def _inner_norms(module: nn.Module, attention: str) -> tuple[tuple[str, NormSpec], ...]:
    """Norms inside an attention module: those on the values' way (multi-head latent attention) have
    to be frozen too; those of queries and keys make no difference under a recorded pattern."""
    found = []
    for name, child in module.get_submodule(attention).named_modules():
        weight = getattr(child, "weight", None)
        if "norm" in type(child).__name__.lower() and weight is not None and weight.dim() == 1:
            path = f"{attention}.{name}"
            found.append((path, probed_spec(module, path, len(weight))))
    return tuple(found)


def _trace_frozen(
    model: Any,
    sites: Sites,
    ids: Tensor,
    start: Tensor,
    leaves: Sequence[Tensor],
    plans: Sequence[_Plan],
    final_norm: FrozenNorm,
    scales: dict[str, Tensor],
) -> list[Tensor]:
    # Several workers on one forward pass: the norms need not run in the order of the other parts
    # (Falcon runs both before attention), nor those inside attention in any order.
    # A product with 1 turns a leaf into a value that the model
    # may change in place.
    with model.trace() as tracer:
        with tracer.invoke(ids):
            reads = nnsight.save([])
            model.get(sites.layers[0].block).input = start[None] * 1
            for number, plan in enumerate(plans):
                resid = model.get(plan.sites.block).input if number else start[None] * 1
                overwrite_pattern(model.get(plan.sites.attention), plan.pattern)
                if plan.side.site == "N1" or plan.sites.mlp_norm is None:
                    x = mlp_in = model.get(plan.sites.mlp_in).input
                else:
                    x = resid if sites.parallel else model.get(plan.sites.mlp_norm).input
                    mlp_in = model.get(plan.sites.mlp_in).input
                x = x.reshape(start.shape)
                if plan.side.site == "N0" and plan.side.read is not None:
                    x = plan.side.read.forward(x).to(start.dtype)
                reads.append(x)
                out = leaves[number] * 1
                if plan.side.skip is not None:
                    out = out + x @ plan.side.skip.T.to(x.dtype)
                model.get(plan.written).output = out.reshape(mlp_in.shape)
            reads.append(model.get(sites.unembed).input[0])
        with tracer.invoke():
            for plan in plans:
                for path, norm in plan.norms:
                    freeze_in_place(model.get(path), norm)
            freeze_in_place(model.get(sites.final_norm), final_norm)
        for j in range(max(len(plan.inner) for plan in plans)):
            with tracer.invoke():
                for plan in plans:
                    if j < len(plan.inner):
                        _freeze_inner(model.get(plan.inner[j][0]), plan.inner[j][1], scales)
    return reads


def _freeze_inner(envoy: Any, spec: NormSpec, scales: dict[str, Tensor]) -> None:
    """Inside a trace: a norm at the first pass's denominators, which ``scales`` keeps."""
    x = envoy.input
    wide = x.to(spec.gain.dtype)
    if envoy.path not in scales:
        scales[envoy.path] = spec.scale(wide.detach())
    if spec.centred:
        wide = wide - wide.mean(-1, keepdim=True)
    out = wide * scales[envoy.path] * spec.gain
    envoy.output = (out if spec.bias is None else out + spec.bias).to(x.dtype)


def freeze_in_place(envoy: Any, norm: FrozenNorm) -> None:
    """Inside a trace: replace a norm's output by the frozen norm of its (live) input."""
    x = envoy.input
    flat = x.reshape(-1, x.shape[-1])
    envoy.output = norm.forward(flat.to(norm.scale.dtype)).to(x.dtype).reshape(x.shape)


def overwrite_pattern(attention: Any, pattern: Tensor) -> None:
    """Inside a trace: replace the attention pattern by a recorded one ``(H, T, T)``.

    The pattern is found by looking: the last operation on it before the product with the values is
    a dropout or, without one, the softmax; it stands in the module's forward or in the attention
    function that forward calls.

    Raises:
        SiteError: No such operation, or one whose result has another shape.
    """
    source = attention.source
    for name in _ATTENTION_CALLS:
        if name in source.names:
            source = getattr(source, name).source
            break
    names = [n for n in source.names if "resid" not in n and "dropout_add" not in n]
    dropouts = [n for n in names if "dropout" in n]
    softmaxes = [n for n in names if "softmax" in n]
    if len(softmaxes) > 1 and not getattr(attention._module.config, "alibi", True):
        dropouts = []  # Falcon: one branch with alibi and dropout, one with neither
    if not dropouts and not softmaxes:
        raise SiteError(
            f"found no softmax in {attention.path} (operations: {', '.join(source.names)}): its "
            "attention pattern cannot be frozen"
        )
    operation = getattr(source, dropouts[-1] if dropouts else softmaxes[0])
    found = operation.output
    if tuple(found.shape) != (1, *pattern.shape):
        raise SiteError(
            f"{operation.path} gives shape {tuple(found.shape)}, expected {(1, *pattern.shape)}: "
            "it is not the attention pattern"
        )
    operation.output = pattern[None].to(found.dtype)
