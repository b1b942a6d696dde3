"""Functions that tests run on the server. As everything that is shipped, they import torch only."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


def embeddings(model: Any, scale: float) -> Tensor:
    """A value of the run, and some arithmetic on the server."""
    return scale * model.model.embed_tokens.output


def slow_embeddings(model: Any, scale: float) -> Tensor:
    """The same after two seconds, which no client takes to ask for the first time."""
    time.sleep(2)
    return embeddings(model, scale)


def fails(model: Any, width: int) -> Tensor:
    """Does not fit: the model's width is another one."""
    return model.model.embed_tokens.output @ torch.zeros(width, width)
