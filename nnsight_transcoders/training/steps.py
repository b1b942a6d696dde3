"""Training steps on activations: batches from the buffer, one learner per group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from .buffer import ActivationBuffer
from .group import LayerStats
from .step import Learner


class Steps(Protocol):
    """What the trainer's loop drives: steps on activations, or through the model.

    Attributes:
        learners: What is trained.
    """

    @property
    def learners(self) -> Sequence[Learner]: ...

    def step(self, number: int) -> tuple[float, dict[int, LayerStats]] | None:
        """Do a step: the loss, and what happened by layer; None at the end of the data."""
        ...

    def state(self) -> dict[str, Any]:
        """The position in the data, JSON-ready."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position in the data."""
        ...


class LocalSteps:
    """Every layer explains its own activations.

    Args:
        buffer: Where batches come from.
        learners: What learns from them.
    """

    def __init__(self, buffer: ActivationBuffer, learners: Sequence[Learner]) -> None:
        self._buffer, self.learners = buffer, learners

    def step(self, number: int) -> tuple[float, dict[int, LayerStats]] | None:
        """See ``Steps``."""
        batch = self._buffer.next_batch()
        if batch is None:
            return None
        loss, layers = 0.0, {}
        for learner in self.learners:
            done = learner.step(batch, number)
            loss += done.loss
            layers.update(done.layers)
        return loss, layers

    def state(self) -> dict[str, Any]:
        """See ``Steps``."""
        return self._buffer.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """See ``Steps``."""
        self._buffer.restore(state)
