"""The scores of one attention layer as an affine function of what it reads, from its own module.

Queries and keys are whatever the attention module hands to its attention function: projections,
QK norms and rotary embedding are the module's own, so that nothing about them needs to be known.
A module that multiplies them itself is stopped at its softmax instead (``products.py``).
With QK norms held at the denominators of the run this is affine in the module's input, and its
matrices follow from the module by differentiation, exactly. What is affine is checked to be, and
the scores must give the pattern that the run had.

Legend: T positions, D d_model, H heads, K key heads, E width of a head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from nnsight_transcoders.errors import SiteError
from nnsight_transcoders.models import hf_module
from nnsight_transcoders.norms import TOLERANCE, NormSpec, norm_spec, relative_difference

from .collect import eager_attention
from .contributions import CircuitRun
from .products import OwnScores, Reached

#: What a module is called with: its positional and its keyword arguments.
Call = tuple[tuple[Any, ...], dict[str, Any]]
#: Under this name transformers knows the attention function that stops and hands out its arguments.
_NAME = "nnsight_transcoders_scores"


def _stop(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> None:
    del module, value
    raise Reached(query, key, mask, options)


@dataclass(frozen=True)
class Affine:
    """``x -> matrix x + bias``: ``(E, D)`` and ``(E,)``."""

    matrix: Tensor
    bias: Tensor


class AttentionScores:
    """One layer's queries, keys and scores at the denominators of a run.

    What is differentiated are the *leaves*: here the module's input alone.

    Args:
        circuit: The run.
        layer: Which layer.

    Raises:
        SiteError: The module's scores are not found, are not affine, or have a term that is
            neither query x key nor a constant (ALiBi).
    """

    def __init__(self, circuit: CircuitRun, layer: int) -> None:
        self._layer, self._path = layer, circuit.sites.layers[layer].attention
        self._dtype, self._limit = circuit.dtype, TOLERANCE[circuit.run.final.dtype]
        self._norms: dict[nn.Module, list[tuple[NormSpec, Tensor]]] = defaultdict(list)
        resid = circuit.run.resid[layer].to(self._dtype)
        norm = circuit.frozen.layers[layer].attention_norm
        self.x = resid if norm is None else norm.forward(resid)
        self._module, self._parameters, call = self._parts(circuit)
        self._args, self._options = (cast_floats(one, self._dtype) for one in call)
        given = self._args[0] if self._args else self._options["hidden_states"]
        if relative_difference(self.x, given[0]) > self._limit:
            raise SiteError(f"{self._path} does not read what the norm before it makes")
        self._record_norms()
        self._at = self._queries_and_keys(self._leaves())
        scaling = self._at.options.get("scaling")
        self.scaling: float = self._at.query.shape[-1] ** -0.5 if scaling is None else scaling
        self._check_pattern(circuit.run.pattern[layer].to(self._dtype))

    @property
    def scores(self) -> Tensor:
        """``(H, T, T)`` before soft-capping, mask and softmax."""
        query, key = self._at.query[0], self._at.key[0]
        key = key.repeat_interleave(len(query) // len(key), 0)
        scores = self.scaling * (query @ key.transpose(1, 2))
        return scores if self._at.offset is None else scores + self._at.offset[0]

    def offset(self, head: int, source: int, destination: int) -> float | None:
        """What the module adds to a score whatever it reads (ALiBi); None if nothing to any."""
        offset = self._at.offset
        return None if offset is None else float(offset[0, head, destination, source])

    def query_and_key(self, head: int, source: int, destination: int) -> tuple[Affine, Affine]:
        """A head's query at one position, and the key that it meets at another, as functions of
        what attention reads there."""
        group = self._at.query.shape[1] // self._at.key.shape[1]
        ends = [("query", head, destination), ("key", head // group, source)]
        matrices = self._matrices([self._slopes(*end) for end in ends])
        query, key = (
            self._affine(matrix, *end) for matrix, end in zip(matrices, ends, strict=True)
        )
        return query, key

    def _affine(self, matrix: Tensor, side: str, head: int, position: int) -> Affine:
        zero = getattr(self._queries_and_keys(self._leaves(zero=True)), side)[0, head, position]
        affine = Affine(matrix, zero.detach())
        expected = getattr(self._at, side)[0, head, position]
        again = affine.matrix @ self.x[position] + affine.bias
        if relative_difference(again, expected) > self._limit:
            raise SiteError(
                f"{self._path}'s {side} is no affine function of its input, even with QK norms "
                f"frozen: it differs by {relative_difference(again, expected):.1e} (relative)"
            )
        return affine

    def _slopes(self, side: str, head: int, position: int) -> dict[str, Tensor]:
        """The slopes ``(E, width)`` of a query or key by what the leaves hold at its position."""
        with torch.enable_grad():
            leaves = {name: leaf.clone().requires_grad_() for name, leaf in self._leaves().items()}
            found = getattr(self._queries_and_keys(leaves), side)[0, head, position]
            rows = [
                torch.autograd.grad(value, [*leaves.values()], retain_graph=True, allow_unused=True)
                for value in found
            ]
        return {
            name: torch.stack(
                [torch.zeros_like(leaf[0]) if one is None else one[position] for one in column]
            )
            for (name, leaf), column in zip(leaves.items(), zip(*rows, strict=True), strict=True)
        }

    # -- what is different for a module without weights (``remote_scores.py``) ---------------------

    def _parts(self, circuit: CircuitRun) -> tuple[nn.Module, dict[str, Any], Call]:
        """The module, its parameters, and what it is called with."""
        module = hf_module(circuit.model).get_submodule(self._path)
        parameters = {
            name: parameter.detach().to(self._dtype) if parameter.is_floating_point() else parameter
            for name, parameter in module.state_dict(keep_vars=True).items()
        }
        return module, parameters, _arguments(circuit, self._path)

    def _leaves(self, *, zero: bool = False) -> dict[str, Tensor]:
        """What queries and keys are functions of; or what it is where the module reads zeros."""
        return {"x": torch.zeros_like(self.x) if zero else self.x}

    def _feed(self, leaves: dict[str, Tensor]) -> Tensor:
        """Make the module use these leaves: what it is to be called with ``(T, D)``."""
        return leaves["x"]

    def _matrices(self, slopes: list[dict[str, Tensor]]) -> list[Tensor]:
        """Slopes ``(E, D)`` by the module's input, from those by the leaves."""
        return [side["x"] for side in slopes]

    def _norm_of(self, norm: nn.Module, x: Tensor) -> NormSpec:
        """What a norm of the module computes."""
        stored = next(iter(norm.parameters()), x).dtype
        return norm_spec(norm, f"a norm in {self._path}", x.flatten(0, -2).to(stored))

    # -- running the module ------------------------------------------------------------------------

    def _queries_and_keys(self, leaves: dict[str, Tensor], hook: Any = None) -> Reached:
        """Call the module up to its attention function; its norms get a hook, by default the one
        that holds them at the run's denominators."""
        x, args, options = self._feed(leaves), self._args, {**self._options}
        if args:
            args = (x[None], *args[1:])
        else:
            options["hidden_states"] = x[None]
        for mode in (nullcontext(), OwnScores()):  # the second one only if nothing stops before
            with ExitStack() as stack:
                stack.enter_context(_stopping(self._module))
                stack.enter_context(self._hooked(hook or self._frozen()))
                stack.enter_context(torch.enable_grad())
                stack.enter_context(mode)
                try:
                    torch.func.functional_call(self._module, self._parameters, args, options)
                except Reached as reached:
                    return reached
        raise SiteError(
            f"{self._path} ({type(self._module).__name__}) neither calls transformers' attention "
            "interface nor puts a product of queries and keys into a softmax: its scores cannot be "
            "taken apart"
        )

    @contextmanager
    def _hooked(self, hook: Any) -> Iterator[None]:
        handles = [
            child.register_forward_hook(hook)
            for child in self._module.modules()
            if "norm" in type(child).__name__.lower() and not [*child.children()]
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record_norms(self) -> None:
        """Keep what each norm is and its denominators at the run's values, call by call."""
        seen: list[tuple[nn.Module, Tensor]] = []

        def hook(norm: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            del out
            seen.append((norm, args[0].detach()))

        self._queries_and_keys(self._leaves(), hook)
        for norm, x in seen:
            spec = self._norm_of(norm, x)
            self._norms[norm].append((spec, spec.scale(x)))

    def _frozen(self) -> Any:
        """A hook that makes norms linear: at the denominators that were recorded."""
        calls: dict[nn.Module, int] = defaultdict(int)

        def hook(norm: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            del out
            spec, scale = self._norms[norm][calls[norm]]
            calls[norm] += 1
            x = args[0] - args[0].mean(-1, keepdim=True) if spec.centred else args[0]
            x = x * scale * spec.gain
            return x if spec.bias is None else x + spec.bias

        return hook

    def _check_pattern(self, pattern: Tensor) -> None:
        """Softmax of the scores, capped and masked, must be the pattern up to attention sinks."""
        scores, cap = self.scores, self._at.options.get("softcap")
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        if self._at.mask is not None:
            scores = scores + self._at.mask[0].to(self._dtype)
        expected = pattern / pattern.sum(-1, keepdim=True)
        difference = relative_difference(scores.softmax(-1), expected)
        if difference > self._limit:
            raise SiteError(
                f"{self._path}'s pattern is not the softmax of scaled query x key (relative "
                f"difference {difference:.1e}): its scores have terms that cannot be taken apart"
            )


@contextmanager
def _stopping(module: nn.Module) -> Iterator[None]:
    """Within, the module's attention function is ``_stop``, if its config chooses one."""
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "_attn_implementation"):
        yield  # Bloom: there is nothing to choose
        return
    transformers.AttentionInterface.register(_NAME, _stop)
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _arguments(circuit: CircuitRun, path: str) -> Call:
    """What the attention module is called with in the run."""
    module, found = hf_module(circuit.model), []

    def hook(attention: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        del attention
        found.append((args, options))

    ids = circuit.run.token_ids[None].to(circuit.run.final.device)
    handle = module.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with eager_attention(module), torch.no_grad():
            module(ids, use_cache=False)
    finally:
        handle.remove()
    return found[0]


def cast_floats(value: Any, dtype: torch.dtype) -> Any:
    """Plain data with its tensors of floats in a dtype."""
    if isinstance(value, tuple | list):
        return type(value)(cast_floats(one, dtype) for one in value)
    if isinstance(value, dict):
        return {name: cast_floats(one, dtype) for name, one in value.items()}
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value
