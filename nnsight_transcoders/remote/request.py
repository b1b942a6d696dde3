"""What is asked for with a remote graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nnsight_transcoders.circuits.targets import Target


@dataclass(frozen=True)
class GraphRequest:
    """What was asked for: ``attribute``'s arguments, as JSON-ready data where they can be.

    Attributes:
        token_ids: The prompt.
        targets: See ``attribute``.
        position: Where they stand, counted from the first token.
        max_n_logits: See ``attribute``.
        desired_logit_prob: See ``attribute``.
        max_feature_nodes: See ``attribute``.
        memory: See ``attribute``.
    """

    token_ids: tuple[int, ...]
    targets: Sequence[Target] | None
    position: int
    max_n_logits: int
    desired_logit_prob: float
    max_feature_nodes: int
    memory: int

    def record(self) -> dict[str, Any]:
        """JSON-ready: what makes a kept graph the same graph."""
        found = {k: v for k, v in self.__dict__.items() if k not in ("targets", "memory")}
        names = [t[0] if isinstance(t, tuple) else t for t in self.targets or ()]
        return {**found, "targets": None if self.targets is None else names}

    def settings(self) -> dict[str, Any]:
        """What a graph's metadata says of its settings."""
        names = ("max_n_logits", "desired_logit_prob", "max_feature_nodes", "position")
        return {name: getattr(self, name) for name in names}
