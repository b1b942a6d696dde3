"""The scores of an attention whose weights are on a server.

The client has the module's code and not its weights. So the code runs here on what its linear maps
gave there: a copy of the module has, in the place of each linear map, one that hands out the
served values, and in the place of each norm what the server's norm was found to compute. A query
then is a function of those values, whose slope meets few rows of the maps, those of its head; they
alone are asked for.

Legend: T positions, D d_model, E width of a head.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nnsight_transcoders.errors import SiteError
from nnsight_transcoders.models import hf_module
from nnsight_transcoders.norms import TOLERANCE, NormSpec, relative_difference, spec_of_probe
from nnsight_transcoders.remote.weights import epsilons

from .contributions import CircuitRun
from .scores import AttentionScores, Call, cast_floats


class ServedLinear(nn.Module):
    """Stands for a linear map of the module's input: gives what the server's gave.

    Args:
        path: Its path, for messages.
        width: Of its output.
        leaves: Where the values are; zeros for a map that is not among them (the values').
        x: ``(T, D)`` the module's input.
        limit: How far what it is given may be from that.
    """

    def __init__(
        self, path: str, width: int, leaves: Mapping[str, Tensor], x: Tensor, limit: float
    ) -> None:
        super().__init__()
        self._path, self._width, self._leaves = path, width, leaves
        self._x, self._limit = x, limit

    def forward(self, x: Tensor) -> Tensor:
        """The served values ``(1, T, width)``."""
        value = self._leaves.get(self._path)
        if value is None:
            return x.new_zeros(*x.shape[:-1], self._width)
        if x.shape[1:] != self._x.shape or relative_difference(x[0], self._x) > self._limit:
            raise SiteError(
                f"{self._path} does not read the attention's input: the scores of this attention "
                "cannot be taken apart without its weights"
            )
        return value[None]


class ServedNorm(nn.Module):
    """Stands for a norm of the module: computes what the server's was found to compute."""

    def __init__(self, spec: NormSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor) -> Tensor:
        """The norm."""
        return self.spec(x)


class RemoteScores(AttentionScores):
    """``AttentionScores`` of a remote model; the leaves are the values of its linear maps."""

    def _parts(self, circuit: CircuitRun) -> tuple[nn.Module, dict[str, Any], Call]:
        assert circuit.there is not None
        self._there, module = circuit.there, hf_module(circuit.model, weights=False)
        own = module.get_submodule(self._path)
        linears, norms = self._children(circuit, own)
        call = self._there.attention_call(self._path, linears, self._to_probe(own, norms))
        self._values = {
            path: tuple(cast_floats(one, self._dtype) for one in pair)
            for path, pair in call["values"].items()
        }
        self._now: dict[str, Tensor] = {}
        stubs: dict[str, nn.Module] = {
            path: ServedNorm(self._spec(path, found, circuit))
            for path, found in zip(norms, call["norms"], strict=True)
        }
        for name, child in own.named_modules():
            if _is_linear(child):
                path, width = f"{self._path}.{name}", _widths(child)[0]
                stubs[path] = ServedLinear(path, width, self._now, self.x, self._limit)
        copied = _copy(own, self._path, stubs)
        _fill_masks(copied, circuit.run.pattern[self._layer])
        return copied, {}, (call["args"], call["options"])

    def _children(self, circuit: CircuitRun, own: nn.Module) -> tuple[list[str], list[str]]:
        """Paths of the linear maps that may make queries and keys, and of the norms."""
        here = circuit.sites.layers[self._layer]
        values = here.value if here.value_layout == "separate" else None
        linears, norms = [], []
        for name, child in own.named_modules():
            path = f"{self._path}.{name}"
            if _is_linear(child) and path not in (values, here.out_proj):
                linears.append(path)
            elif "norm" in type(child).__name__.lower() and not [*child.children()]:
                norms.append(path)
        return linears, norms

    def _to_probe(self, own: nn.Module, norms: list[str]) -> list[dict[str, Any]]:
        found = []
        for path in norms:
            norm: Any = own.get_submodule(path.removeprefix(f"{self._path}."))
            if getattr(norm, "weight", None) is None:
                raise SiteError(
                    f"{path} ({type(norm).__name__}) has no gain that says how wide it is: the "
                    "scores of this attention cannot be taken apart without its weights"
                )
            found.append({"path": path, "width": norm.weight.numel(), "eps": epsilons(norm)})
        return found

    def _spec(self, path: str, found: Mapping[str, Any], circuit: CircuitRun) -> NormSpec:
        spec = spec_of_probe(path, found, TOLERANCE[circuit.run.final.dtype])
        gain, bias = (cast_floats(value, self._dtype) for value in (spec.gain, spec.bias))
        return replace(spec, gain=gain, bias=bias)

    def _leaves(self, *, zero: bool = False) -> dict[str, Tensor]:
        if zero:
            return {path: bias.expand_as(value) for path, (value, bias) in self._values.items()}
        return {path: value for path, (value, _) in self._values.items()}

    def _feed(self, leaves: dict[str, Tensor]) -> Tensor:
        self._now.update(leaves)
        return self.x

    def _matrices(self, slopes: list[dict[str, Tensor]]) -> list[Tensor]:
        used = [
            {path: slope.any(0).nonzero().flatten() for path, slope in side.items()}
            for side in slopes
        ]
        wanted = [
            (path, columns.tolist())
            for side in used
            for path, columns in side.items()
            if len(columns)
        ]
        rows = iter(self._there.rows(wanted, self.x.shape[1], self._dtype))
        found = []
        for side, columns in zip(slopes, used, strict=True):
            parts = [
                slope[:, columns[path]] @ next(rows)
                for path, slope in side.items()
                if len(columns[path])
            ]
            found.append(sum(parts, self.x.new_zeros(1)))
        return found

    def _norm_of(self, norm: nn.Module, x: Tensor) -> NormSpec:
        del x
        assert isinstance(norm, ServedNorm)
        return norm.spec


def attention_scores(circuit: CircuitRun, layer: int) -> AttentionScores:
    """The scores of a layer of a model that is here, or of one on a server."""
    kind = AttentionScores if circuit.there is None else RemoteScores
    return kind(circuit, layer)


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _widths(linear: Any) -> tuple[int, int]:
    """Widths of a linear map's output and input."""
    out, width = linear.weight.shape
    return (width, out) if type(linear).__name__ == "Conv1D" else (out, width)


def _copy(module: nn.Module, path: str, stubs: Mapping[str, nn.Module]) -> nn.Module:
    """The same module with others in the place of some of its children. What it holds is shared;
    hooks, and the ``forward`` that nnsight gives each module of a model, are left behind."""
    if path in stubs:
        return stubs[path]
    copied = copy.copy(module)
    for name in ("forward", "__nnsight__"):
        vars(copied).pop(name, None)
    for name, value in vars(copied).items():
        if isinstance(value, dict):
            hooks = name.endswith("_hooks") or "_hooks_" in name
            vars(copied)[name] = OrderedDict() if hooks else type(value)(value)
    for name, child in module.named_children():
        copied._modules[name] = _copy(child, f"{path}.{name}", stubs)
    return copied


def _fill_masks(module: nn.Module, pattern: Tensor) -> None:
    """A causal mask that the module keeps as a buffer (GPT-Neo) is made from what the run's pattern
    shows to be visible; whether it is right shows when the scores are compared with the pattern."""
    visible = (pattern > 0).any(0)
    length = len(visible)
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.is_meta and buffer.dtype in (torch.bool, torch.uint8):
                mask = torch.zeros(buffer.shape, dtype=buffer.dtype)
                mask[..., :length, :length] = visible.to(mask)
                child._buffers[name] = mask
