"""Functions that tests run on the server. As everything that is shipped, they import torch only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def embeddings(model: Any, scale: float) -> Tensor:
    """A value of the run, and some arithmetic on the server."""
    return scale * model.model.embed_tokens.output


def fails(model: Any, width: int) -> Tensor:
    """Does not fit: the model's width is another one."""
    return model.model.embed_tokens.output @ torch.zeros(width, width)
