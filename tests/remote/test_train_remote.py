"""Training on the activations of a model that runs on a server: the same weights as at home."""

from __future__ import annotations

from typing import Any

import nnsight
import pytest
import torch
import transformers

from nnsight_transcoders import builtin_model_path, train
from nnsight_transcoders.errors import ConfigError

SETTINGS: dict[str, Any] = {
    "layers": [1, 2],
    "d_transcoder": 64,
    "k": 8,
    "n_tokens": 1600,
    "batch_size": 200,
    "buffer_size": 800,
    "lr": 0.01,
    "rows_per_forward": 4,
}


@pytest.mark.parametrize("input_site", ["N1", "N0", "O"])
def test_the_weights_are_those_of_a_model_that_is_here(server: Any, input_site: str) -> None:
    path, task = builtin_model_path(), "text-generation"
    here = nnsight.TransformersModel(path, task=task, dispatch=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    there = nnsight.TransformersModel(path, task=task, tokenizer=tokenizer)
    settings = SETTINGS | {"input_site": input_site}
    found = train(there, "builtin", settings, remote=server.url, verbose=False)
    assert next(there._module.parameters()).is_meta  # the model's weights stayed where they are
    expected = train(here, "builtin", settings, verbose=False)
    for layer in (1, 2):
        for name, weight in expected[layer].state_dict().items():
            torch.testing.assert_close(
                found[layer].state_dict()[name], weight, rtol=1e-4, atol=1e-5
            )


def test_end_to_end_needs_the_model_here(server: Any) -> None:
    model = nnsight.TransformersModel(builtin_model_path(), task="text-generation", dispatch=True)
    start = train(model, "builtin", SETTINGS, verbose=False)
    with pytest.raises(ConfigError, match="objective 'kl' needs a model that is here"):
        further = SETTINGS | {"objective": "kl"}
        train(model, "builtin", further, start=start, remote=server.url, verbose=False)
