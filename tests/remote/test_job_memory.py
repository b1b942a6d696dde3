"""What an edge job holds at once, measured on the job itself.

The job runs here on a recorded run of a model: its modules' inputs and outputs, and the modules
themselves, with or without their weights (a sandboxed job can only call them).
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nnsight
import pytest
import torch
import transformers
import zoo
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnsight_transcoders import ModelShape, attribute, resolve_sites
from nnsight_transcoders.check import random_transcoders
from nnsight_transcoders.circuits import attention_weights
from nnsight_transcoders.circuits.active import active_features
from nnsight_transcoders.circuits.collect import collect, eager_attention
from nnsight_transcoders.circuits.freeze import freeze_norms, input_values, mlp_sides
from nnsight_transcoders.circuits.targets import choose_targets
from nnsight_transcoders.remote.edge_job import graph_edges, unpack_rows
from nnsight_transcoders.remote.job_memory import estimate_edge_memory
from nnsight_transcoders.remote.payload import KNOWN_SHAPES, megabytes
from nnsight_transcoders.remote.problem import edge_problem

IDS = [1, 40, 7, 23]
MEMORY = 2**19
PAGE = Path(__file__).parents[2] / "docs" / "remote.md"


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made within and still alive, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        given = {
            one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if is_tensor(one)
        }
        result = func(*args, **(kwargs or {}))
        self._alive = {k: one for k, one in self._alive.items() if not one[0].expired()}
        for one in tree_leaves(result):
            if is_tensor(one) and one.untyped_storage()._cdata not in given:
                storage = one.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu"


class Recorded:
    """A module's values in a run, and the module to call."""

    def __init__(self, module: nn.Module, shown: nn.Module) -> None:
        self.input: Any = None
        self.output: Any = None
        self._call, self._module = module, shown

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._call(x)


def recorded(module: nn.Module, *, weights: bool) -> Any:
    """The model as a job sees it, in the middle of a run of ``IDS``."""
    shown = module if weights else copy.deepcopy(module).to("meta")
    places = {name: Recorded(m, shown.get_submodule(name)) for name, m in module.named_modules()}
    handles = []
    for name, child in module.named_modules():

        def keep(_: Any, args: Any, options: Any, output: Any, place: Any = places[name]) -> None:
            place.input = args[0] if args else next(iter(options.values()), None)
            place.output = output

        handles.append(child.register_forward_hook(keep, with_kwargs=True))
    with eager_attention(module), torch.no_grad():
        module(torch.tensor([IDS]), use_cache=False)
    for handle in handles:
        handle.remove()
    return SimpleNamespace(get=places.__getitem__)


@cache
def deep_model() -> Any:
    """A model most of which is attention."""
    config = transformers.LlamaConfig(
        vocab_size=zoo.VOCAB,
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=3,
        intermediate_size=64,
    )
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config).eval().to(torch.bfloat16)
    return nnsight.TransformersModel(module, task="text-generation", tokenizer=zoo.tokenizer())


@cache
def problem() -> tuple[dict[str, Any], int]:
    """The edge request of a graph of it, and how many features are active."""
    model = deep_model()
    module, sites = model._module, resolve_sites(model)
    run = collect(model, sites, torch.tensor(IDS))
    made = random_transcoders(run, "per-layer", d_transcoder=4, dtype=torch.bfloat16)
    norms = freeze_norms(module, sites, run)
    sides = mlp_sides(sites, run, norms, made)
    active = active_features(run, made, input_values(run, sides), torch.float32)
    final = norms[sites.final_norm].forward(run.final.float())[-1]
    chosen = choose_targets(model, module, sites, run, final, None, 10, 0.95)
    settings = {"max_nodes": 7500, "memory": MEMORY, "result_dtype": None}
    asked = edge_problem(sites, run, norms, sides, active, chosen, len(IDS) - 1, settings)
    return asked.whole(), sum(map(len, active.layers.values()))


@pytest.mark.parametrize("weights", [True, False], ids=["in the model's process", "sandboxed"])
def test_maps_are_widened_a_layer_at_a_time(weights: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_weights, "BASIS_ROWS", 64)
    asked, n_active = problem()
    module = deep_model()._module
    model = recorded(module, weights=weights)
    with LiveBytes() as live:
        graph_edges(model, asked)
    shape = ModelShape.of(module, resolve_sites(module))
    wide = 4 * shape.n_layers * shape.map_elements  # all maps in float32
    assert wide > 2e6
    assert live.peak < (0.5 if weights else 0.9) * wide
    expected = estimate_edge_memory(
        shape, n_positions=len(IDS), n_active=n_active, memory=MEMORY, sandboxed=not weights
    )
    assert 0.4 * expected.total < live.peak < 1.2 * expected.total


@pytest.mark.parametrize("weights", [True, False], ids=["in the model's process", "sandboxed"])
def test_the_edges_are_those_of_a_local_graph(weights: bool) -> None:
    asked, n_features = problem()
    found = graph_edges(recorded(deep_model()._module, weights=weights), asked)
    model = deep_model()
    run = collect(model, resolve_sites(model), torch.tensor(IDS))
    made = random_transcoders(run, "per-layer", d_transcoder=4, dtype=torch.bfloat16)
    expected = attribute(model, made, IDS).adjacency()
    rows = unpack_rows(found["rows"], torch.float32)
    n_sources, n_logits = rows.shape[1], len(rows) - n_features
    wanted = torch.cat([expected[:n_features], expected[-n_logits:]])[:, :n_sources]
    torch.testing.assert_close(rows, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_the_page_says_how_much() -> None:
    """The numbers of docs/remote.md."""
    text = PAGE.read_text(encoding="utf-8")
    table = text.partition("<!-- memory table -->\n")[2].partition("<!-- end -->")[0]
    rows = {line.split("|")[1].strip(): line for line in table.splitlines()[2:]}
    assert set(rows) == set(KNOWN_SHAPES)
    for name in rows:
        cells = [cell.strip() for cell in rows[name].split("|")[2:-1]]
        boxed, own = (estimate_edge_memory(KNOWN_SHAPES[name], sandboxed=s) for s in (True, False))
        parts = (boxed.maps, boxed.layer, boxed.vectors, boxed.rows, boxed.total, own.total)
        assert cells == [megabytes(part) for part in parts]
