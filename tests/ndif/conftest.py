"""A real NDIF server, the builtin model seen from its client without weights, and the wire between.

Nothing here starts before a test asks for it. The server that is running is used (`python
tests/ndif/ndif_server.py start`), else one is started and stopped at the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ndif_layout import REPO_ID, Layout
from ndif_server import Server, ServerError
from ndif_wire import Wire

from nnsight_transcoders import TranscoderSet
from nnsight_transcoders.builtin import builtin_model_path


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server that serves requests; what this session started, it stops."""
    found = Server(Layout.from_environment())
    if "NDIF" not in os.environ and not Path(found.layout.program("gunicorn")).exists():
        pytest.skip(f"no NDIF server in {found.layout.venv}: run `make test-ndif`")
    was_running = found.running()
    try:
        found.start()
    except ServerError as error:
        pytest.fail(str(error), pytrace=False)
    yield found
    if not was_running:
        found.stop()


@pytest.fixture(scope="session")
def _client(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Point the Hub client at the server's Hub (it has read its environment already)."""
    from huggingface_hub import constants

    cache = tmp_path_factory.mktemp("huggingface")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", server.hub_url)
        template = server.hub_url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        patch.delenv("HF_TOKEN", raising=False)
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield


@pytest.fixture(scope="session")
def model(_client: None) -> Any:
    """The builtin model under its name on the server, without weights."""
    import nnsight
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(REPO_ID)
    found = nnsight.TransformersModel(REPO_ID, task="text-generation", tokenizer=tokenizer)
    assert {p.device.type for p in found._module.parameters()} == {"meta"}
    return found


@pytest.fixture(scope="session")
def local() -> Any:
    """The same model with its weights, here."""
    import nnsight

    return nnsight.TransformersModel(builtin_model_path(), task="text-generation", dispatch=True)


@pytest.fixture(scope="session", params=["per-layer", "skip", "clt"])
def transcoders(request: pytest.FixtureRequest) -> TranscoderSet:
    """Each of the builtin sets."""
    return TranscoderSet.from_pretrained(f"builtin/{request.param}")


@pytest.fixture(scope="session")
def per_layer() -> TranscoderSet:
    return TranscoderSet.from_pretrained("builtin/per-layer")


@pytest.fixture(params=["trusted", "sandboxed"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the server runs a request's code: in the model's process, or in one without weights.

    The API key decides, as on NDIF.
    """
    from nnsight import CONFIG

    monkeypatch.setattr(CONFIG.API, "APIKEY", request.param)
    monkeypatch.setattr(CONFIG.APP, "REMOTE_LOGGING", False)
    return request.param


@pytest.fixture
def wire(server: Server, mode: str) -> Iterator[Wire]:  # noqa: ARG001 - both modes
    """What goes to the server in this test; its `url` is the address to use as `remote`."""
    server.start()  # a test may have ended it
    with Wire(server.url).running() as found:
        yield found


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
