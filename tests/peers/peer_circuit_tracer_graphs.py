"""Runs in circuit-tracer's own environment: makes, reads, prunes and serves graphs. Imports nothing
of ours.

A job comes as JSON on stdin: ``model`` and ``set`` (folders), ``token_ids``, ``out`` (a folder),
``graph`` (a ``.pt`` file of ours), ``served`` (a folder for the local page) and ``paths`` to ask
its server for. What was found goes to ``{out}/found.json``; graphs go beside it.
"""

from __future__ import annotations

import functools
import json
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import torch
from circuit_tracer import attribute
from circuit_tracer.frontend.graph_models import Model
from circuit_tracer.frontend.local_server import (
    DEFAULT_FRONTEND_DIR,
    CircuitGraphHandler,
    ReusableTCPServer,
)
from circuit_tracer.graph import Graph, compute_graph_scores, prune_graph
from circuit_tracer.replacement_model.replacement_model_transformerlens import (
    TransformerLensReplacementModel,
)
from circuit_tracer.utils.create_graph_files import create_graph_files
from peer_circuit_tracer import read
from transformer_lens import loading_from_pretrained as loading
from transformers import AutoTokenizer
from yaml import safe_load


def replacement(model: str, folder: Path) -> Any:
    """The model with the set. TransformerLens opens models of its own list by name only; these are
    its steps for a folder."""
    cfg = loading.get_pretrained_model_config(model, device="cpu", dtype=torch.float32)
    made = TransformerLensReplacementModel(cfg, AutoTokenizer.from_pretrained(model))
    made.load_and_process_state_dict(
        loading.get_pretrained_state_dict(model, cfg, dtype=torch.float32),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
    )
    made._configure_replacement_model(read(folder, safe_load((folder / "config.yaml").read_text())))
    return made


def about(graph: Graph) -> dict[str, Any]:
    """What circuit-tracer makes of a graph."""
    pruned = prune_graph(graph)
    return {
        "scores": compute_graph_scores(graph),
        "targets": [list(target) for target in graph.logit_targets],
        "features": graph.active_features[graph.selected_features].tolist(),
        "kept": int(pruned.node_mask.sum()),
        "n_layers": graph.cfg.n_layers,
        "scan": graph.scan,
    }


def asked(folder: str, paths: list[str]) -> dict[str, Any]:
    """The answers of circuit-tracer's server to some paths, as text. On this machine only."""
    handler = functools.partial(
        CircuitGraphHandler, frontend_dir=DEFAULT_FRONTEND_DIR, data_dir=folder
    )
    with ReusableTCPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        port = server.server_address[1]
        found = {}
        for path in paths:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
                found[path] = answer.read().decode()
        server.shutdown()
        thread.join()
    return found


def main() -> None:
    job = json.load(sys.stdin)
    out = Path(job["out"])
    theirs = attribute(
        torch.tensor(job["token_ids"]), replacement(job["model"], Path(job["set"])), verbose=False
    )
    theirs.cfg.tokenizer_name = job["model"]  # a folder; its own name is on the Hub
    theirs.to_pt(str(out / "theirs.pt"))
    create_graph_files(theirs, "theirs", str(out / "graphs"), scan="owner/set")
    ours = Graph.from_pt(job["graph"])
    create_graph_files(ours, "ours-pt", str(out / "graphs"))
    served = asked(job["served"], job["paths"])
    for path, text in served.items():
        if path.startswith("/graph_data/"):
            Model.model_validate_json(text)
    found = {"theirs": about(theirs), "ours": about(ours), "served": served}
    (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
