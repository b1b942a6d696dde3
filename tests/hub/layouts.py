"""Synthetic checkpoints of the smaller formats: sackfield, llamascopium, clt-training and so on.

Written from the table of formats and the formats' own code, not by this package: every function
makes a folder and returns the tensors it wrote, by file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoints import random, write_tensors

D, F, L = 6, 20, 3

Files = dict[str, dict[str, Tensor]]


def write_files(folder: Path, files: Files) -> None:
    for name, tensors in files.items():
        write_tensors(folder / name, tensors)


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def sackfield(folder: Path, **changes: Any) -> Files:
    files: Files = {}
    for layer in range(2):
        seed = 10 * layer
        files[f"layer_{layer}.safetensors"] = {
            "W_enc": random(seed, D, F),
            "b_enc": random(seed + 1, F),
            "threshold": random(seed + 2, F).abs(),
            "W_dec": random(seed + 3, F, D),
            "b_dec": random(seed + 4, D),
            "W_skip": random(seed + 5, D, D),
        }
        config = {"layer": layer, "d_model": D, "d_hidden": F, "activation": "jumprelu"}
        write_json(folder / f"layer_{layer}.json", {**config, "model_name": "owner/m", **changes})
    write_files(folder, files)
    return files


def llamascopium(folder: Path, inside: str = "transcoder/8x/k4", **changes: Any) -> Files:
    files: Files = {}
    for layer in range(2):
        seed, name = 10 * layer, f"{inside}/layer{layer}_8x_k4"
        reads, writes = f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out"
        config = {
            "sae_type": "sae",
            "d_model": D,
            "expansion_factor": F / D,
            "act_fn": "jumprelu",
            "norm_activation": "dataset-wise",
            "sparsity_include_decoder_norm": True,
            "use_glu_encoder": False,
            "top_k": 4,
            "hook_point_in": reads,
            "hook_point_out": writes,
            **changes,
        }
        tensors = {
            "W_E": random(seed, D, F),
            "b_E": random(seed + 1, F),
            "W_D": random(seed + 2, F, D),
            "b_D": random(seed + 3, D),
            f"dataset_average_activation_norm.{reads}": torch.tensor(1.7 + layer),
            f"dataset_average_activation_norm.{writes}": torch.tensor(0.6),
        }
        if config["act_fn"] == "jumprelu":
            tensors["activation_function.log_jumprelu_threshold"] = random(seed + 4, F)
        files[f"{name}/sae_weights.safetensors"] = tensors
        write_json(folder / name / "config.json", config)
        write_json(folder / name / "lm_config.json", {"model_name": "owner/m"})
    write_files(folder, files)
    return files


def llamascopium_clt(folder: Path, **changes: Any) -> Files:
    reads = [f"blocks.{layer}.ln2.hook_normalized" for layer in range(L)]
    writes = [f"blocks.{layer}.hook_mlp_out" for layer in range(L)]
    config = {
        "sae_type": "clt",
        "d_model": D,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "top_k": 4,
        "hook_points_in": reads,
        "hook_points_out": writes,
        **changes,
    }
    tensors = {"W_E": random(1, L, D, F), "b_E": random(2, L, F)}
    for target in range(L):
        tensors[f"W_D.{target}"] = random(10 + target, target + 1, F, D)
        tensors[f"b_D.{target}"] = random(20 + target, D)
        tensors[f"dataset_average_activation_norm.{reads[target]}"] = torch.tensor(1.5 + target)
        tensors[f"dataset_average_activation_norm.{writes[target]}"] = torch.tensor(0.5 + target)
    if config["act_fn"] == "jumprelu":
        tensors["activation_function.log_jumprelu_threshold"] = random(3, L, F)
    files = {"sae_weights.safetensors": tensors}
    write_json(folder / "config.json", config)
    write_files(folder, files)
    return files


def clt_training(folder: Path, mode: str = "pairs", **changes: Any) -> Files:
    """``mode``: "pairs", "source" (tied per source), "concat", "per-layer", "single"."""
    files: Files = {}
    for layer in range(L):
        seed, n = 100 * layer, L - layer
        config = {
            "activation": "topk",
            "k": 5,
            "transcode": True,
            "d_in": D,
            "num_latents": F,
            "n_targets": 0 if mode == "single" else n,
            "n_sources": layer + 1,
            "skip_connection": True,
            "normalize_io": True,
            "coalesce_topk": mode if mode in ("concat", "per-layer") else "none",
            "per_source_tied": mode == "source",
            **changes,
        }
        tensors = {"encoder.weight": random(seed, F, D), "encoder.bias": random(seed + 1, F)}
        if mode == "pairs":
            tensors |= {f"W_decs.{j}": random(seed + 10 + j, F, D) for j in range(n)}
        else:
            rows = F * (layer + 1) if mode == "per-layer" else F
            tensors["W_dec"] = random(seed + 10, rows, D)
        if mode in ("pairs", "source"):
            tensors |= {f"b_decs.{j}": random(seed + 20 + j, D) for j in range(n)}
            tensors |= {f"W_skips.{j}": torch.zeros(D, D) for j in range(n)}
            tensors["W_skips.0"] = random(seed + 30, D, D)
        else:
            tensors |= {"b_dec": random(seed + 20, D), "W_skip": random(seed + 30, D, D)}
        if config["normalize_io"]:
            tensors |= {"in_norm": torch.tensor([2.0 + layer]), "out_norm": torch.tensor([0.7])}
        if mode == "single":
            tensors["post_enc"] = torch.zeros(F)
        else:
            tensors |= {f"post_encs.{j}": torch.zeros(F) for j in range(n)}
        name = f"layers.{layer}.mlp"
        files[f"{name}/sae.safetensors"] = tensors
        write_json(folder / name / "cfg.json", config)
    write_files(folder, files)
    return files


def decode_clt(folder: Path, **changes: Any) -> Files:
    config = {
        "num_features": F,
        "num_layers": L,
        "d_model": D,
        "activation_fn": "jumprelu",
        "normalization_method": "mean_std",
        "decoder_tying": "none",
        "tl_input_template": "blocks.{}.ln2.hook_normalized",
        "tl_output_template": "blocks.{}.hook_mlp_out",
        **changes,
    }
    tying, decoder = config["decoder_tying"], "decoder_module.decoders"
    tensors: dict[str, Tensor] = {}
    for layer in range(L):
        tensors[f"encoder_module.encoders.{layer}.weight"] = random(layer, F, D)
        tensors[f"encoder_module.encoders.{layer}.bias_param"] = random(50 + layer, F)
        keys = [f"{layer}->{t}" for t in range(layer, L)] if tying == "none" else [str(layer)]
        for n, key in enumerate(keys):
            tensors[f"{decoder}.{key}.weight"] = random(100 + 10 * layer + n, D, F)
            tensors[f"{decoder}.{key}.bias_param"] = random(200 + 10 * layer + n, D)
    if config["activation_fn"] == "jumprelu":
        tensors["theta_manager.log_threshold"] = random(7, L, F)
    files = {"clt.safetensors": tensors}
    write_json(folder / "cfg.json", config)
    if config["normalization_method"] == "mean_std":
        sides = ("inputs", "targets")
        statistics = {
            str(layer): {
                side: {
                    "mean": random(300 + 2 * layer + n, D).tolist(),
                    "std": (random(400 + 2 * layer + n, D).abs() + 0.5).tolist(),
                }
                for n, side in enumerate(sides)
            }
            for layer in range(L)
        }
        write_json(folder / "norm_stats.json", statistics)
    write_files(folder, files)
    return files


def joint_topk(folder: Path, biases: bool = False) -> Files:
    files: Files = {}
    norms = []
    for layer in range(L):
        seed = 10 * layer
        W_dec = random(seed + 3, F, L - layer, D)
        norms.append(W_dec.square().sum((1, 2)).sqrt())
        files[f"W_enc_{layer}.safetensors"] = {f"W_enc_{layer}": random(seed, F, D)}
        files[f"W_dec_{layer}.safetensors"] = {
            f"W_dec_{layer}": W_dec,
            f"W_dec_norm_{layer}": norms[-1],
        }
        if biases:
            files[f"W_enc_{layer}.safetensors"] |= {
                f"b_enc_{layer}": random(seed + 1, F),
                f"b_dec_{layer}": random(seed + 2, D),
            }
    files["W_dec_norm.safetensors"] = {"W_dec_norm": torch.stack(norms)}
    scales = {"resid_mid_l2": torch.ones(L), "mlp_out_l2": torch.ones(L)}
    files["factors.safetensors"] = scales
    write_json(folder / "config.json", {"d_feature": F, "k": 2, "base_model": "some/model"})
    write_files(folder, files)
    return files


def tiny_model(folder: Path, variants: tuple[str, ...] = ("S-3_R1_P0",)) -> Files:
    files: Files = {}
    for layer in range(2):
        for n, variant in enumerate(variants):
            seed, name = 10 * layer + 100 * n, f"mlp_map_test/M{layer}_{variant}"
            files[f"{name}.pt"] = {
                "encoder.weight": random(seed, F, D),
                "encoder.bias": random(seed + 1, F),
                "decoder.weight": random(seed + 2, D, F),
                "decoder.bias": random(seed + 3, D),
            }
            write_json(folder / f"{name}_config.json", {"n_features": F})
            torch.save(files[f"{name}.pt"], folder / f"{name}.pt")
    return files
