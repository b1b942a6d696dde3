"""One process or several: everything that several need comes from ``accelerate``.

``accelerate launch`` starts the processes and says so in the environment; a single process needs
nothing and imports nothing.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from nnsight_transcoders.errors import ConfigError


class Processes:
    """The processes that train together.

    Attributes:
        rank: This one's number.
        world: How many there are.
    """

    def __init__(self) -> None:
        self._accelerator: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self._accelerator = _accelerator()
        self.rank = 0 if self._accelerator is None else self._accelerator.process_index
        self.world = 1 if self._accelerator is None else self._accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and shows."""
        return self.rank == 0

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module as it is called in training, its gradients averaged over the processes."""
        return module if self._accelerator is None else self._accelerator.prepare(module)

    def backward(self, loss: Tensor) -> None:
        """The gradients of a loss."""
        loss.backward() if self._accelerator is None else self._accelerator.backward(loss)

    def any_of(self, mask: Tensor) -> Tensor:
        """True where it is in any process."""
        if self._accelerator is None:
            return mask
        return self._accelerator.reduce(mask.int(), reduction="sum") > 0

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes."""
        if self._accelerator is None:
            return value
        return self._accelerator.reduce(value, reduction="mean")

    def everywhere(self, value: bool) -> bool:
        """Whether it is true in all processes; they wait for each other."""
        if self._accelerator is None:
            return value
        return all(self.gather([value]))

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in each."""
        if self._accelerator is None:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)

    def wait(self) -> None:
        """Wait until all are here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()


def _accelerator() -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ConfigError(
            "training in several processes needs accelerate: pip install "
            "'nnsight-transcoders[train]'"
        ) from error
    return Accelerator()
