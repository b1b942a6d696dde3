"""A known sparse MLP is found again; more sparsity weight gives fewer active features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planted import CONTEXT, planted_model, recovered, rows

from nnsight_transcoders import TrainConfig, train

#: A planted set-up that trains in seconds.
CONFIG = TrainConfig(
    context=CONTEXT,
    pack=False,
    d_transcoder=96,
    batch_size=1024,
    buffer_size=32_768,
    rows_per_forward=64,
    n_tokens=1024 * 400,
    lr=0.02,
    dead_after=50_000,
)


@pytest.fixture(scope="module")
def planted() -> Any:
    return planted_model()


@pytest.fixture(scope="module")
def data() -> list[torch.Tensor]:
    return rows(2048)


@pytest.mark.parametrize(
    "settings",
    [
        {"activation": "relu", "sparsity_weight": 0.001},
        {"activation": "jumprelu", "sparsity_weight": 0.001},
        {"activation": "topk", "k": 6},
        {"activation": "batchtopk", "k": 4},
    ],
    ids=lambda settings: settings["activation"],
)
def test_a_planted_mlp_is_recovered(planted: Any, data: Any, settings: dict[str, Any]) -> None:
    model, reads, writes = planted
    transcoder = train(model, data, CONFIG.replace(**settings), verbose=False)[0]
    assert recovered(reads, transcoder.W_enc) > 0.9
    assert recovered(writes, transcoder.W_dec) > 0.9


@pytest.mark.parametrize(
    ("activation", "sparsity", "decoder_norm", "weights"),
    [
        ("relu", "l1", "weighted", (1e-4, 1e-3, 1e-2, 1e-1)),
        ("relu", "tanh", "unit", (1e-4, 1e-3, 1e-2, 1e-1)),
        ("jumprelu", "l0", "weighted", (1e-4, 4e-4, 1.6e-3, 6.4e-3)),
        ("jumprelu", "tanh", "weighted", (1e-4, 1e-3, 1e-2, 1e-1)),
    ],
)
def test_l0_falls_with_the_sparsity_weight(
    planted: Any,
    data: Any,
    activation: str,
    sparsity: str,
    decoder_norm: str,
    weights: tuple[float, ...],
) -> None:
    model, *_ = planted
    x = _mlp_inputs(model, data[:64])
    measured = []
    for weight in weights:
        config = CONFIG.replace(
            activation=activation,
            sparsity=sparsity,
            decoder_norm=decoder_norm,
            sparsity_weight=weight,
            n_tokens=1024 * 150,
        )
        transcoder = train(model, data, config, verbose=False)[0]
        measured.append(float((transcoder.encode(x) > 0).float().sum(-1).mean()))
    assert measured == sorted(measured, reverse=True), measured
    assert measured[0] > 1.5 * measured[-1], measured


def _mlp_inputs(model: Any, data: list[torch.Tensor]) -> torch.Tensor:
    seen = []
    mlp = model._module.transformer.h[0].mlp
    handle = mlp.register_forward_hook(lambda _, args, __: seen.append(args[0][:, 1:]))
    with torch.no_grad():
        model._module(torch.stack(data))
    handle.remove()
    return seen[0].flatten(0, 1)
