"""What travels is source text of torch-only modules, and nothing is left behind."""

from __future__ import annotations

import pickletools
import sys
from typing import Any

import cloudpickle
import pytest
import torch
from nnsight.schema.request import RequestModel

from nnsight_transcoders.circuits import intervention_job
from nnsight_transcoders.circuits.attribution import attribute
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.remote import calls, edge_job, loader, packing
from nnsight_transcoders.remote.loader import load_shipped, run_shipped
from nnsight_transcoders.remote.shipping import (
    AVAILABLE,
    entry_of,
    loader_by_value,
    shipped_sources,
)

SHIPPED = [
    packing.read_packed,
    edge_job.graph_edges,
    edge_job.chunk_edges,
    intervention_job.run_interventions,
]


class Recorder:
    """A backend that keeps the request."""

    def __call__(self, tracer: Any) -> None:
        self.blob = RequestModel.serialize(tracer)


def request(model: Any, function: Any, *args: Any) -> bytes:
    recorder, ids = Recorder(), torch.zeros(1, 3, dtype=torch.long)
    with loader_by_value():
        calls._shipped(
            model, ids, shipped_sources(function), entry_of(function), args, {}, recorder, False
        )
    return recorder.blob


@pytest.mark.parametrize("function", SHIPPED, ids=lambda f: f.__name__)
def test_the_modules_that_travel_import_torch_at_most(function):
    sources = shipped_sources(function)
    assert list(sources)[-1] == function.__module__
    before = set(sys.modules)
    loaded = load_shipped(sources)
    assert callable(getattr(loaded[function.__module__], function.__name__))
    assert set(sys.modules) == before  # and nothing of ours was added or replaced
    roots = {name.partition(".")[0] for name in sources}
    assert roots == {"nnsight_transcoders"} and {"nnsight", "torch", "tqdm"} == AVAILABLE
    assert not any(word in name for name in sources for word in ("hub", "sets", "sites"))


def test_loaded_modules_are_copies_and_the_package_stays_in_place():
    import nnsight_transcoders.circuits.linear as here

    sources = shipped_sources(edge_job.graph_edges)
    there = load_shipped(sources)["nnsight_transcoders.circuits.linear"]
    assert there is not here and sys.modules[here.__name__] is here
    norm = there.FrozenNorm(torch.ones(3), None, torch.ones(2, 1), False)
    assert torch.equal(norm.forward(torch.ones(2, 3)), torch.ones(2, 3))


def test_a_module_that_needs_more_is_refused():
    with pytest.raises(InputError, match="cannot be shipped to a server: it imports"):
        shipped_sources(attribute)


def test_only_functions_at_the_top_of_a_module_can_be_named():
    for function in (lambda model: model, torch.nn.Linear.forward):
        with pytest.raises(InputError, match="top of a module"):
            entry_of(function)


@pytest.mark.parametrize("function", SHIPPED, ids=lambda f: f.__name__)
def test_a_request_holds_no_bytecode_and_names_no_module_of_ours(model, function):
    """Bytecode would tie the server to this Python version; a reference to this package would have
    to be importable there."""
    names = set()
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(request(model, function)):
        if isinstance(argument, str):
            strings.append(argument)
        if opcode.name == "STACK_GLOBAL":
            names.add((strings[-2], strings[-1]))
    assert ("nnsight.intervention.serialization", "_load_function") in names
    assert not any("CodeType" in name or "make_function" in name for _, name in names)
    assert not any(module.startswith("nnsight_transcoders") for module, _ in names)


def test_nothing_stays_registered():
    nnsight_registered = cloudpickle.list_registry_pickle_by_value()
    with loader_by_value():
        assert loader.__name__ in cloudpickle.list_registry_pickle_by_value()
        with loader_by_value():
            pass
        assert loader.__name__ in cloudpickle.list_registry_pickle_by_value()
    assert cloudpickle.list_registry_pickle_by_value() == nnsight_registered


def test_an_error_names_our_file_and_line():
    source = "def fail(x):\n    return x / 0\n"
    with pytest.raises(ZeroDivisionError) as raised:
        run_shipped(
            {"nnsight_transcoders.made_up": source}, "nnsight_transcoders.made_up:fail", (1,)
        )
    frame = raised.traceback[-1]
    assert str(frame.path).endswith("nnsight_transcoders/made_up.py") and frame.lineno == 1
    assert "x / 0" in str(frame.statement)
