"""Settings for all tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Models this small are slower on several threads, and much slower on a busy machine."""
    torch.set_num_threads(1)
