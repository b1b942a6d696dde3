"""A server on loopback, and the builtin model with and without its weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nnsight
import pytest
import transformers
from loopback import Loopback
from nnsight.modeling import huggingface
from nnsight.schema.config import CONFIG

from nnsight_transcoders import TranscoderSet, builtin_model_path


@pytest.fixture(scope="session", autouse=True)
def no_hub() -> Iterator[None]:
    """The model's id on the server comes from the Hub, which is not asked here; and no status
    lines among the test results."""
    patch = pytest.MonkeyPatch()
    patch.setitem(huggingface._ID_CACHE, builtin_model_path(), "test/builtin")
    patch.setattr(CONFIG.APP, "REMOTE_LOGGING", False)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def server() -> Iterator[Loopback]:
    """A server without this package."""
    started = Loopback(builtin_model_path()).start()
    yield started
    started.kill()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Loopback]:
    """A server that a test may kill; what it answered outlives it."""
    folder = tmp_path / "server"
    folder.mkdir()
    started = Loopback(builtin_model_path(), folder).start()
    yield started
    started.kill()


@pytest.fixture(scope="session")
def local() -> Any:
    """The builtin model with its weights."""
    return nnsight.TransformersModel(builtin_model_path(), task="text-generation", dispatch=True)


@pytest.fixture(scope="session")
def model() -> Any:
    """The builtin model on the meta device: a module tree and a tokenizer."""
    path = builtin_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return nnsight.TransformersModel(path, task="text-generation", tokenizer=tokenizer)


@pytest.fixture(scope="session", params=["per-layer", "skip", "clt"])
def transcoders(request: pytest.FixtureRequest) -> TranscoderSet:
    """Each builtin set."""
    return TranscoderSet.from_pretrained(f"builtin/{request.param}")


@pytest.fixture(scope="session")
def per_layer() -> TranscoderSet:
    """One builtin set."""
    return TranscoderSet.from_pretrained("builtin/per-layer")
