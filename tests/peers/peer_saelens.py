"""Runs in SAELens' own environment: reads or writes a set there. Imports nothing of this package.

Jobs come as JSON on stdin: ``[[command, folder, inputs, outputs], ...]``, the last two safetensors
files: ``x``, and what each layer makes of it. The command ``read`` opens a folder; ``write`` first
makes one transcoder per architecture, a layer each, and saves it there as SAELens does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import sae_lens
import torch
from safetensors.torch import load_file, save_file

CLASSES = ("Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder")


def outputs(folder: Path, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each ``layer_{i}`` folder's transcoder makes of ``x``."""
    found = {}
    for place in sorted(folder.glob("layer_*")):
        layer = place.name.removeprefix("layer_")
        sae = sae_lens.SAE.load_from_disk(place)
        assert sae.cfg.metadata.hook_name.startswith(f"blocks.{layer}."), sae.cfg.metadata
        with torch.no_grad():
            given = x.to(sae.W_enc.dtype)
            found[f"features_{layer}"] = sae.encode(given).float()
            found[f"output_{layer}"] = sae(given).float()
    return found


def write(folder: Path, width: int) -> None:
    """One random transcoder of each architecture."""
    torch.manual_seed(0)
    for layer, name in enumerate(CLASSES):
        config = getattr(sae_lens, f"{name}Config")(
            d_in=width,
            d_sae=40,
            d_out=width,
            apply_b_dec_to_input=False,  # what its default is, it refuses
            metadata=sae_lens.saes.sae.SAEMetadata(
                model_name="owner/model",
                hook_name=f"blocks.{layer}.mlp.hook_in",
                hook_name_out=f"blocks.{layer}.hook_mlp_out",
            ),
        )
        sae = getattr(sae_lens, name)(config)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.normal_()
            if hasattr(sae, "threshold"):
                sae.threshold.abs_()
        sae.save_model(folder / f"layer_{layer}")


def main() -> None:
    for command, folder, inputs, results in json.load(sys.stdin):
        x = load_file(inputs)["x"]
        if command == "write":
            write(Path(folder), x.shape[1])
        save_file(outputs(Path(folder), x), results)


if __name__ == "__main__":
    main()
