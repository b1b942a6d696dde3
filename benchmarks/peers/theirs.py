"""Runs in circuit-tracer's environment: one graph of a case, with times and peak memory.

    python theirs.py CASE_FOLDER BACKEND BATCH_SIZE OUT

Imports nothing of this package but ``meter``. Writes ``OUT.safetensors`` and ``OUT.json``.
"""

from __future__ import annotations

import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from circuit_tracer import ReplacementModel, attribute
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from circuit_tracer.utils.hf_utils import load_transcoders
from meter import Meter
from safetensors.torch import save_file
from transformers import AutoTokenizer

CPU = torch.device("cpu")
#: How the messages of its log begin -> our name of the phase that begins there.
PHASES = {
    "Phase 0": "features",
    "Phase 1": "forward",
    "Phase 2": "targets",
    "Phase 3": "edges",
    "Feature attributions completed": "assemble",
}


class LogPhases(logging.Filter):
    """Starts a phase of the meter where the log says that one begins; prints nothing."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def filter(self, record: logging.LogRecord) -> bool:
        for start, name in PHASES.items():
            if record.getMessage().startswith(start):
                self.meter.start(name)
        return False


def opened(folder: Path) -> Any:
    """The set with its default laziness: encoders in memory, decoder rows read when used."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    if config["model_kind"] == "cross_layer_transcoder":
        hooks = {key: config[key] for key in ("feature_input_hook", "feature_output_hook")}
        return load_clt(str(folder), **hooks, device=CPU, dtype=torch.float32)
    n_layers = len(list(folder.glob("layer_*.safetensors")))
    files = [str(folder / f"layer_{layer}.safetensors") for layer in range(n_layers)]
    local = {"transcoders": files, "repo_id": "", "scan": "local"}
    return load_transcoders({**config, **local}, device=CPU, dtype=torch.float32)


def replacement(folder: Path, backend: str) -> Any:
    """The model with the set, as ``ReplacementModel.from_pretrained`` would make it."""
    path, transcoders = str(folder / "model"), opened(folder / "set")
    if backend == "nnsight":
        return ReplacementModel.from_pretrained_and_transcoders(
            path, transcoders, backend="nnsight", device=CPU, dtype=torch.float32
        )
    # TransformerLens opens models of its own list by name only; these are its steps for a folder.
    from circuit_tracer.replacement_model.replacement_model_transformerlens import (
        TransformerLensReplacementModel,
    )
    from transformer_lens import loading_from_pretrained as loading

    cfg = loading.get_pretrained_model_config(path, device="cpu", dtype=torch.float32)
    # Of a Llama folder it takes the default base of the rotary embedding, whatever the config says.
    theta = json.loads((folder / "model" / "config.json").read_text()).get("rope_theta")
    cfg.rotary_base = cfg.rotary_base if theta is None else theta
    model = TransformerLensReplacementModel(cfg, AutoTokenizer.from_pretrained(path))
    model.load_and_process_state_dict(
        loading.get_pretrained_state_dict(path, cfg, dtype=torch.float32),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
    )
    model._configure_replacement_model(transcoders)
    return model


def main() -> None:
    folder, backend, batch_size, out = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    settings = json.loads((folder / "settings.json").read_text())
    meter = Meter()
    meter.start("load")
    model = replacement(folder, backend)
    contexts: list[Any] = []
    setup = model.setup_attribution

    def kept(*args: Any, **kwargs: Any) -> Any:
        contexts.append(setup(*args, **kwargs))
        return contexts[-1]

    object.__setattr__(model, "setup_attribution", kept)
    meter.stop()
    logging.getLogger("attribution").addFilter(LogPhases(meter))
    graph = attribute(
        torch.tensor(settings["token_ids"]),
        model,
        batch_size=batch_size,
        max_feature_nodes=settings["max_feature_nodes"],
        verbose=True,
    )
    meter.stop()
    save_file(
        {
            "active": graph.active_features.contiguous(),
            "activation": graph.activation_values.contiguous(),
            "selected": graph.selected_features.contiguous(),
            "adjacency": graph.adjacency_matrix.contiguous(),
            "logits": torch.tensor([target.vocab_idx for target in graph.logit_targets]),
            "probability": graph.logit_probabilities.detach().contiguous(),
            "error": contexts[0].error_vectors.detach().contiguous(),
        },
        f"{out}.safetensors",
    )
    names = ("circuit-tracer", "torch", "transformers", "transformer-lens", "nnsight")
    record = {**meter.to_dict(), "versions": {name: version(name) for name in names}}
    Path(f"{out}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
