"""The scores of an attention module that makes them itself, without transformers' interface.

GPT-Neo, Falcon and Bloom multiply queries and keys inside of their own modules, and scale, shift
(ALiBi) and mask the product on its way into the softmax. Torch's own function mode sees both ends:
the first product of two batches of heads is that of queries and keys, and what the softmax gets
is affine in it, so that its derivative is the scaling and its value at a product of zero is the
rest. Whoever uses this checks that it was affine (``scores.py`` compares patterns).

Legend: T positions, H heads, K key heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

#: Masks are the lowest number of some dtype, perhaps shifted; ALiBi does not come near it.
_MASKED = torch.finfo(torch.float16).min / 2

_MATMULS: tuple[Any, ...] = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
_BADDBMMS: tuple[Any, ...] = (torch.baddbmm, Tensor.baddbmm)


class Reached(Exception):  # noqa: N818 - not an error
    """Carries what scores are made of out of an attention module.

    Attributes:
        query: ``(1, H, T, E)``.
        key: ``(1, K, T, E)``.
        mask: Added to the scores before softmax, for the sake of what it blocks.
        options: ``scaling`` and ``softcap``, if there are any.
        offset: ``(1, H, T, T)`` a further constant term of the scores (ALiBi).
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
        offset: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.query, self.key, self.mask, self.options = query, key, mask, options
        self.offset = offset


class OwnScores(TorchFunctionMode):
    """Within, a module that multiplies queries and keys itself stops at its softmax with
    ``Reached``. Wants gradients to be enabled."""

    def __init__(self) -> None:
        super().__init__()
        self._sides: tuple[Tensor, Tensor] | None = None
        self._product = torch.empty(0)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        options = kwargs or {}
        if self._sides is None and func in _MATMULS:
            if all(isinstance(one, Tensor) and one.dim() == 4 for one in args):
                return self._zero_product(args[0], args[1])
        elif self._sides is None and func in _BADDBMMS:
            return self._baddbmm(*args, **options)
        elif self._sides is not None and func in (functional.softmax, torch.softmax):
            raise self._reached(args[0] if args else options["input"], *self._sides)
        return func(*args, **options)

    def _zero_product(self, query: Tensor, key: Tensor) -> Tensor:
        """Keep the factors; go on with zeros, whose derivative will be wanted."""
        self._sides = query, key.transpose(-1, -2)
        shape = (*query.shape[:-1], key.shape[-1])
        self._product = query.new_zeros(shape, requires_grad=True)
        return self._product * 1  # a value that the module may change in place

    def _baddbmm(
        self, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
    ) -> Tensor:
        return beta * input + alpha * self._zero_product(batch1, batch2)

    def _reached(self, logits: Tensor, query: Tensor, key: Tensor) -> Reached:
        """From what the softmax gets at a product of zero."""
        (slope,) = torch.autograd.grad(logits.sum(), self._product)
        query, key = (one if one.dim() == 4 else one[None] for one in (query, key))
        logits = logits.detach().to(query.dtype)
        blocked = logits < _MASKED
        mask = logits.masked_fill(~blocked, 0)
        offset = logits.masked_fill(blocked, 0)
        scaling = float(slope.flatten()[0])  # the first position is always visible to itself
        return Reached(
            query, key, mask, {"scaling": scaling}, offset if bool(offset.any()) else None
        )
