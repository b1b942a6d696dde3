"""Where the weights of a model come from: its module, or wherever else they can be had.

Writing down a frozen model takes three kinds of weights: the gains of norms, the value and output
projections, and the unembedding. A model that is here has them in its modules; those of a remote
model come from its server and its checkpoint (``remote/weights.py``).
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nnsight_transcoders.norms import NormSpec, norm_spec

from .attention_weights import Linear, probed_weight, stored_weight


@runtime_checkable
class ModelWeights(Protocol):
    """Weights of a model, by module path."""

    def norm(self, path: str, x: Tensor) -> NormSpec:
        """What a norm computes, compared on values ``x (n, D)`` where its module is here.

        Raises:
            SiteError: It is neither a LayerNorm nor an RMSNorm.
        """
        ...

    def linear(self, path: str, width: int, dtype: torch.dtype) -> Linear:
        """A linear map's weight ``(out, in)`` and bias, ``width`` being that of its input.

        Raises:
            SiteError: It cannot be had.
        """
        ...


class ModuleWeights:
    """Weights of a module that is here.

    Args:
        module: The Hugging Face module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def norm(self, path: str, x: Tensor) -> NormSpec:
        """See ``ModelWeights.norm``."""
        return norm_spec(self._module.get_submodule(path), path, x)

    def linear(self, path: str, width: int, dtype: torch.dtype) -> Linear:
        """See ``ModelWeights.linear``."""
        return linear_weight(self._module.get_submodule(path), width, dtype)


def weights_of(source: nn.Module | ModelWeights) -> ModelWeights:
    """A module's weights; weights from elsewhere as they are."""
    return ModuleWeights(source) if isinstance(source, nn.Module) else source


def linear_weight(linear: nn.Module, width: int, dtype: torch.dtype) -> Linear:
    """A linear module's weight ``(out, in)`` and bias, whatever its class.

    ``nn.Linear`` and transformers' ``Conv1D`` are read; anything else (quantised layers) is asked
    for its values on a basis.
    """
    stored = stored_weight(linear, dtype)
    if stored is not None:
        return stored
    like = next(p for p in linear.parameters())
    floating = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    with torch.no_grad():
        return probed_weight(linear, width, like.new_empty(0, dtype=floating), dtype)
