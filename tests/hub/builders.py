"""A valid checkpoint of every format, for tests that go through all of them.

A builder writes one into a folder and returns the options that opening it needs. To add one:

    @builder("my-format")
    def _my_format(folder: Path) -> dict[str, Any]:
        write_it(folder)
        return {}
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnsight_transcoders.hub.circuit_tracer import save_circuit_tracer

from . import layouts
from . import test_circuit_tracer as circuit_tracer
from . import test_dunefsky as dunefsky
from . import test_gemma_scope as gemma_scope
from . import test_gemma_scope_2 as gemma_scope_2
from . import test_peek as peek
from . import test_saelens as saelens
from . import test_sparsify as sparsify
from .checkpoints import make_set, random

Builder = Callable[[Path], dict[str, Any]]

#: Name (the format's, perhaps with a variant behind a colon) -> builder.
BUILDERS: dict[str, Builder] = {}


def builder(name: str) -> Callable[[Builder], Builder]:
    """Add a builder under the name of a format, or ``"format:variant"``."""

    def add(function: Builder) -> Builder:
        assert name not in BUILDERS
        BUILDERS[name] = function
        return function

    return add


@builder("nnsight-transcoders")
def _native(folder: Path) -> dict[str, Any]:
    make_set((0, 1), activation="jumprelu", skip=True).save_pretrained(folder)
    return {}


@builder("nnsight-transcoders:cross-layer")
def _native_cross_layer(folder: Path) -> dict[str, Any]:
    make_set((0, 1), cross_layer=True).save_pretrained(folder)
    return {}


@builder("circuit-tracer")
def _circuit_tracer(folder: Path) -> dict[str, Any]:
    layer = circuit_tracer.layer_tensors(1, k=torch.tensor(4))
    circuit_tracer.write_set(folder, [layer], activation="topk")
    return {}


@builder("circuit-tracer:cross-layer")
def _circuit_tracer_cross_layer(folder: Path) -> dict[str, Any]:
    save_circuit_tracer(make_set((0, 1), cross_layer=True, activation="jumprelu"), folder)
    return {}


@builder("peek")
def _peek(folder: Path) -> dict[str, Any]:
    info = {"input_layer": peek.place(3, "mlp_in"), "output_layer": peek.place(3, "mlp_out")}
    peek.write_layer(folder / "tc3", info=info, act_fn="top_k", top_k=5)
    return {}


@builder("dunefsky")
def _dunefsky(folder: Path) -> dict[str, Any]:
    dunefsky.write_layer(folder, 3, dunefsky.weights(1))
    return {}


@builder("dunefsky:legacy")
def _dunefsky_legacy(folder: Path) -> dict[str, Any]:
    dunefsky.write_layer(folder, 3, dunefsky.weights(1), legacy=True)
    return {}


@builder("gemma-scope")
def _gemma_scope(folder: Path) -> dict[str, Any]:
    gemma_scope.write_layer(folder, 3, 9, gemma_scope.arrays(1))
    return {}


@builder("gemma-scope:compressed")
def _gemma_scope_compressed(folder: Path) -> dict[str, Any]:
    gemma_scope.write_layer(folder, 3, 9, gemma_scope.arrays(1), save=np.savez_compressed)
    return {"l0": 10}


@builder("gemma-scope-2")
def _gemma_scope_2(folder: Path) -> dict[str, Any]:
    content = gemma_scope_2.tensors(1, affine=True)
    name = "transcoder_all/layer_3_width_16k_l0_small_affine"
    gemma_scope_2.write_layer(folder, name, content, gemma_scope_2.config(3))
    return {}


@builder("gemma-scope-2:cross-layer")
def _gemma_scope_2_cross_layer(folder: Path) -> dict[str, Any]:
    gemma_scope_2.write_clt(folder / "clt" / "width_262k_l0_big")
    return {}


@builder("sparsify")
def _sparsify(folder: Path) -> dict[str, Any]:
    skip = random(9, sparsify.D, sparsify.D)
    sparsify.write_layer(folder / "layers.3.mlp", sparsify.tensors(1, W_skip=skip))
    return {}


@builder("sparsify:legacy")
def _sparsify_legacy(folder: Path) -> dict[str, Any]:
    sparsify.write_layer(folder / "h.3.mlp", sparsify.tensors(1), {})
    return {}


@builder("saelens")
def _saelens(folder: Path) -> dict[str, Any]:
    kind = "jumprelu_skip_transcoder"
    saelens.write_layer(folder / "a", 3, saelens.tensors(1, kind), kind)
    return {}


@builder("sackfield")
def _sackfield(folder: Path) -> dict[str, Any]:
    layouts.sackfield(folder)
    return {}


@builder("llamascopium")
def _llamascopium(folder: Path) -> dict[str, Any]:
    layouts.llamascopium(folder)
    return {}


@builder("llamascopium:cross-layer")
def _llamascopium_cross_layer(folder: Path) -> dict[str, Any]:
    layouts.llamascopium_clt(folder)
    return {}


@builder("clt-training")
def _clt_training(folder: Path) -> dict[str, Any]:
    layouts.clt_training(folder)
    return {}


@builder("clt-training:single")
def _clt_training_single(folder: Path) -> dict[str, Any]:
    layouts.clt_training(folder, "single")
    return {}


@builder("decode-clt")
def _decode_clt(folder: Path) -> dict[str, Any]:
    layouts.decode_clt(folder)
    return {}


@builder("joint-topk")
def _joint_topk(folder: Path) -> dict[str, Any]:
    layouts.joint_topk(folder)
    return {}


@builder("tiny-model")
def _tiny_model(folder: Path) -> dict[str, Any]:
    layouts.tiny_model(folder)
    return {}
