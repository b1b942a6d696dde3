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

    Args:
        circuit: The run.
        layer: Which layer.

    Raises:
        SiteError: The module's scores are not found, are not affine, or have a term that is
            neither query x key nor a constant (ALiBi).
    """

    def __init__(self, circuit: CircuitRun, layer: int) -> None:
        self._path = circuit.sites.layers[layer].attention
        self._module = hf_module(circuit.model).get_submodule(self._path)
        self._dtype, self._limit = circuit.dtype, TOLERANCE[circuit.run.final.dtype]
        args, options = _arguments(circuit, self._path)
        self._args, self._options = args, options
        self._parameters = {
            name: parameter.detach().to(self._dtype) if parameter.is_floating_point() else parameter
            for name, parameter in self._module.state_dict(keep_vars=True).items()
        }
        self._norms: dict[nn.Module, list[tuple[NormSpec, Tensor]]] = defaultdict(list)
        resid = circuit.run.resid[layer].to(self._dtype)
        norm = circuit.frozen.layers[layer].attention_norm
        self.x = resid if norm is None else norm.forward(resid)
        given = args[0] if args else options["hidden_states"]
        if relative_difference(self.x, given[0].to(self._dtype)) > self._limit:
            raise SiteError(f"{self._path} does not read what the norm before it makes")
        self._record_norms()
        self._at = self._queries_and_keys(self.x)
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

    def query(self, head: int, position: int) -> Affine:
        """A head's query at a position as a function of what attention reads there."""
        return self._affine("query", head, position)

    def key(self, head: int, position: int) -> Affine:
        """The key that a (query) head meets at a position."""
        group = self._at.query.shape[1] // self._at.key.shape[1]
        return self._affine("key", head // group, position)

    def _affine(self, side: str, head: int, position: int) -> Affine:
        with torch.enable_grad():
            x = self.x.clone().requires_grad_()
            found = getattr(self._queries_and_keys(x), side)[0, head, position]
            rows = [
                torch.autograd.grad(value, x, retain_graph=True)[0][position] for value in found
            ]
        zero = getattr(self._queries_and_keys(torch.zeros_like(self.x)), side)[0, head, position]
        affine = Affine(torch.stack(rows), zero.detach())
        expected = getattr(self._at, side)[0, head, position]
        again = affine.matrix @ self.x[position] + affine.bias
        if relative_difference(again, expected) > self._limit:
            raise SiteError(
                f"{self._path}'s {side} is no affine function of its input, even with QK norms "
                f"frozen: it differs by {relative_difference(again, expected):.1e} (relative)"
            )
        return affine

    def _queries_and_keys(self, x: Tensor, hook: Any = None) -> Reached:
        """Call the module up to its attention function; its norms get a hook, by default the one
        that holds them at the run's denominators."""
        args, options = self._args, {**self._options}
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

        self._queries_and_keys(self.x, hook)
        for norm, x in seen:
            stored = next(iter(norm.parameters()), x).dtype
            spec = norm_spec(norm, f"a norm in {self._path}", x.flatten(0, -2).to(stored))
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


def _arguments(circuit: CircuitRun, path: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the attention module is called with in the run, floats in the run's dtype."""
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

    def cast(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(cast(one) for one in value)
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(circuit.dtype) if floating else value

    args, options = found[0]
    return cast(args), {name: cast(value) for name, value in options.items()}
