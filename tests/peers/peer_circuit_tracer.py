"""Runs in circuit-tracer's own environment: reads or writes a set there. Imports nothing of ours.

Jobs come as JSON on stdin: ``[[command, folder, inputs, outputs], ...]``, the last two safetensors
files: ``x (layers, n, d)``, and ``features`` and ``output`` of the set. The command ``read`` opens
a folder; ``write-KIND`` makes a set and saves it there as circuit-tracer does. KIND is ``relu``,
``jumprelu``, ``skip`` or ``clt``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
from circuit_tracer.utils.hf_utils import load_transcoders
from safetensors.torch import load_file, save_file

WIDTH = 40
CPU = torch.device("cpu")


def read(folder: Path, config: dict[str, Any]) -> Any:
    """A set as circuit-tracer loads it, but from a folder instead of the Hub."""
    if config["model_kind"] == "cross_layer_transcoder":
        hooks = {k: config[k] for k in ("feature_input_hook", "feature_output_hook")}
        return load_clt(str(folder), **hooks, device=CPU, dtype=torch.float32, lazy_decoder=False)
    files = sorted(folder.glob("layer_*.safetensors"))
    local = {"transcoders": list(map(str, files)), "repo_id": "", "scan": "local"}
    return load_transcoders({**config, **local}, device=CPU)


def made(kind: str, n_layers: int, d: int) -> Any:
    """A random set of circuit-tracer's own classes."""
    torch.manual_seed(0)
    options = {"device": CPU, "dtype": torch.float32}
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    if kind == "clt":
        found: Any = CrossLayerTranscoder(
            n_layers, WIDTH, d, lazy_decoder=False, activation_function="jump_relu", **options
        )
    else:
        layers = {}
        for layer in range(n_layers):
            activation = JumpReLU(torch.rand(WIDTH)) if kind == "jumprelu" else F.relu
            layers[layer] = SingleLayerTranscoder(
                d, WIDTH, activation, layer, skip_connection=kind == "skip", **options
            )
        found = TranscoderSet(layers, **hooks)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            parameter.normal_()
            if "threshold" in name:
                parameter.abs_()
    return found


def main() -> None:
    for command, folder, inputs, results in json.load(sys.stdin):
        x, place = load_file(inputs)["x"], Path(folder)
        if command == "read":
            transcoders = read(place, yaml.safe_load((place / "config.yaml").read_text()))
        else:
            transcoders = made(command.removeprefix("write-"), x.shape[0], x.shape[2])
            transcoders.to_safetensors(folder)
        with torch.no_grad():
            features = transcoders.encode(x)
            output = transcoders.decode(features, x)
        save_file({"features": features.contiguous(), "output": output.contiguous()}, results)


if __name__ == "__main__":
    main()
