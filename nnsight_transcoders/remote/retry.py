"""Trying again, with pauses that grow, what can safely be tried again."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from nnsight_transcoders.errors import ServerUnreachableError

logger = logging.getLogger(__name__)

T = TypeVar("T")


def pauses(first: float = 0.2, largest: float = 10.0) -> Iterator[float]:
    """Seconds to wait before each next try: doubling, with a share left to chance, so that many
    clients do not all come back at once."""
    pause = first
    while True:
        yield pause * random.uniform(0.75, 1.25)
        pause = min(2 * pause, largest)


def retrying(once: Callable[[], T], patience: float) -> T:
    """Call until it works.

    Args:
        once: Raises ``ServerUnreachableError`` with ``safe_to_repeat`` where another try may help
            and cannot do anything twice.
        patience: Seconds after which the error is passed on.
    """
    deadline = time.monotonic() + patience
    for pause in pauses():
        try:
            return once()
        except ServerUnreachableError as error:
            if not error.safe_to_repeat or time.monotonic() + pause > deadline:
                raise
            logger.info("trying again in %.1f s: %s", pause, error)
        time.sleep(pause)
    raise AssertionError("pauses() does not end")
