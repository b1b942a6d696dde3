"""The nnsight model that a user hands in: its module, checked, and its name."""

from __future__ import annotations

from typing import Any

from torch import nn

from .builtin import builtin_model_path
from .errors import InputError


def hf_module(model: Any, *, weights: bool = True) -> nn.Module:
    """The Hugging Face module inside an nnsight model, loaded and in evaluation mode.

    Args:
        model: An nnsight model.
        weights: Load the weights of a model that has none yet. Its module tree, which is all that
            a remote model needs, is there without them.

    Raises:
        InputError: Not an nnsight model, or one in training mode (dropout would be on).
    """
    module = getattr(model, "_module", None)
    if not isinstance(module, nn.Module):
        raise InputError(
            f"expected an nnsight model (TransformersModel, LanguageModel, NNsight), got "
            f"{type(model).__name__}: wrap it, e.g. nnsight.NNsight(module)"
        )
    if weights and not has_weights(module):
        dispatch = getattr(model, "dispatch", None)
        if dispatch is None:
            raise InputError("the model has no weights (meta device): load it with dispatch=True")
        dispatch()
        module = model._module
    # Built from a config alone, a module is in training mode; on a server it is not.
    if module.training and has_weights(module):
        raise InputError("the model is in training mode, where dropout is on: call .eval() first")
    return module


def has_weights(module: nn.Module) -> bool:
    """Whether a module's weights are here, and not on the meta device."""
    return not any(parameter.is_meta for parameter in module.parameters())


def hub_name(module: nn.Module) -> str | None:
    """The model's Hub id or folder, ``"builtin"`` for the builtin one; None if it has no name."""
    name = getattr(getattr(module, "config", None), "_name_or_path", None)
    return "builtin" if name == builtin_model_path() else str(name or "") or None
