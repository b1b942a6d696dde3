"""One graph of a case with this package, with times and peak memory.

    python ours.py CASE_FOLDER OUT [--offload cpu|disk]

Writes ``OUT.safetensors`` and ``OUT.json`` as ``theirs.py`` does; the dense adjacency matrix only
of a graph that is not too large for one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nnsight
import torch
import transformers
from meter import Meter
from safetensors.torch import save_file

from nnsight_transcoders import AttributionGraph, TranscoderSet, attribute
from nnsight_transcoders.circuits import attribution
from nnsight_transcoders.circuits.graph import ERROR, FEATURE, LOGIT, TOKEN

#: The steps of ``attribute`` -> the phase each belongs to.
STEPS = {
    "collect": "forward",
    "_engine": "freeze",
    "choose_targets": "targets",
    "active_features": "features",
    "expand": "edges",
    "edge_table": "assemble",
    "assemble": "assemble",
}

#: Larger graphs are not compared entry by entry.
DENSE_NODES = 16384


def metered(meter: Meter, kept: dict[str, Any]) -> None:
    """Have the steps of ``attribute`` report to the meter and keep what they return."""

    def wrapped(step: Callable[..., Any], name: str, phase: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with meter.phase(phase):
                found = step(*args, **kwargs)
            if name == "active_features":
                kept["error"] = torch.stack(found.error)
            return found

        return run

    for name, phase in STEPS.items():
        setattr(attribution, name, wrapped(getattr(attribution, name), name, phase))


def tables(graph: AttributionGraph, error: torch.Tensor) -> dict[str, torch.Tensor]:
    """The graph as circuit-tracer lays it out: features, errors, tokens, logits."""
    of = {kind: graph.kind == kind for kind in (FEATURE, ERROR, TOKEN, LOGIT)}
    features = of[FEATURE]
    active = torch.stack([graph.layer, graph.position, graph.index], 1)[features]
    return {
        "active": active.contiguous(),
        "activation": graph.value[features].contiguous(),
        "adjacency": graph.adjacency(),
        "logits": graph.index[of[LOGIT]].contiguous(),
        "probability": graph.probability[of[LOGIT]].contiguous(),
        "error": error,
        "bias": graph.bias,
        "total": graph.total,
    }


def main() -> None:
    folder, out = Path(sys.argv[1]), sys.argv[2]
    offload: Any = sys.argv[4] if sys.argv[3:4] == ["--offload"] else None
    settings = json.loads((folder / "settings.json").read_text())
    meter, kept = Meter(), {}
    with meter.phase("load"):
        module = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "model", attn_implementation="eager", dtype=torch.float32
        ).eval()
        model = nnsight.NNsight(module)
        transcoders = TranscoderSet.from_pretrained(folder / "set")
    meter.start("loaded")
    metered(meter, kept)
    limit = settings["max_feature_nodes"]
    graph = attribute(
        model,
        transcoders,
        settings["token_ids"],
        max_feature_nodes=10**9 if limit is None else limit,
        offload=offload,
    )
    meter.stop()
    if graph.n_nodes < DENSE_NODES:
        save_file(tables(graph, kept["error"]), f"{out}.safetensors")
    record = {
        **meter.to_dict(),
        "completeness_error": graph.completeness_error,
        "n_active": graph.metadata["n_active_features"],
        "n_nodes": len(graph.of_kind("feature")),
        "versions": {
            name: version(name)
            for name in ("nnsight-transcoders", "torch", "transformers", "nnsight")
        },
    }
    Path(f"{out}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
