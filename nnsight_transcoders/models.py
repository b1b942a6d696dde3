"""Checks on the nnsight model that a user hands in."""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import InputError


def hf_module(model: Any) -> nn.Module:
    """The Hugging Face module inside an nnsight model, loaded and in evaluation mode.

    Raises:
        InputError: Not an nnsight model, or one in training mode (dropout would be on).
    """
    module = getattr(model, "_module", None)
    if not isinstance(module, nn.Module):
        raise InputError(
            f"expected an nnsight model (TransformersModel, LanguageModel, NNsight), got "
            f"{type(model).__name__}: wrap it, e.g. nnsight.NNsight(module)"
        )
    if any(parameter.is_meta for parameter in module.parameters()):
        dispatch = getattr(model, "dispatch", None)
        if dispatch is None:
            raise InputError("the model has no weights (meta device): load it with dispatch=True")
        dispatch()
        module = model._module
    if module.training:
        raise InputError("the model is in training mode, where dropout is on: call .eval() first")
    return module
