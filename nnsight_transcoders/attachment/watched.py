"""A tensor that tells when it is changed in place (torch only: it travels to remote jobs).

A sparse autoencoder reads the place that it writes. When a block changes its features there, the
place has been written already, and has to be written again at once: there is no later moment
before the model reads it. So what the block gets to change says when it was changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Watched(Tensor):
    """A view of a tensor that calls a function after each change in place, also of its own views.

    Everything that is computed from it is an ordinary tensor; so is what is left of it when it is
    saved or sent.
    """

    _changed: Callable[[], None]

    @classmethod
    def of(cls, value: Tensor, changed: Callable[[], None]) -> Watched:
        """Watch a tensor."""
        found = value.as_subclass(cls)
        found._changed = changed
        return found

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        with torch._C.DisableTorchFunctionSubclass():
            options = kwargs or {}
            watched = [one for one in (*args, *options.values()) if isinstance(one, Watched)]
            before = [one._version for one in watched]
            result = func(*args, **options)
            changed = [
                one for one, version in zip(watched, before, strict=True) if one._version != version
            ]
            for one in changed:
                one._changed()
            if isinstance(result, Tensor) and not isinstance(result, Watched):
                for one in watched:
                    if _same_memory(result, one):
                        return cls.of(result, one._changed)
            return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
