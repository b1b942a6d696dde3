"""Measures the builtin model, alone and with its MLPs replaced, with nothing but torch hooks.

It is kept apart from the package's own evaluation on purpose: the training script, the tests and
`record.json` take their numbers from here, so that they can serve as an oracle for the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from nnsight_transcoders.builtin import text
from nnsight_transcoders.transcoder import CrossLayerPart, Transcoder

Layers = dict[int, Tensor]
"""Layer -> values of one row per position, (positions, width)."""
Modules = Mapping[int, Transcoder | CrossLayerPart]
LEADING = 1
"""The first position (`<bos>`) is left to the model's own MLPs."""


@torch.no_grad()
def task_scores(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: str,
    split: str,
    n: int = 500,
) -> dict[str, float]:
    """Accuracy of the most likely token and probability of all right answers, on one task."""
    tests = text.examples(task, split, n, seed=1)
    encoded = tokenizer([test.prompt for test in tests], padding=True, return_tensors="pt")
    last = encoded["attention_mask"].sum(-1) - 1
    logits = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits[
        torch.arange(n), last
    ]
    probabilities = logits.float().softmax(-1)
    right = torch.zeros_like(probabilities)
    for row, test in enumerate(tests):
        right[row, tokenizer.convert_tokens_to_ids(list(test.answers))] = 1
    best = right.gather(1, logits.argmax(-1, keepdim=True))
    return {
        "accuracy": round(best.mean().item(), 4),
        "mass": round((probabilities * right).sum(-1).mean().item(), 4),
    }


def all_scores(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int = 500
) -> dict[str, dict[str, float]]:
    """`task_scores` of every task and split, under names such as `two-hop/held_out`."""
    return {
        f"{task}/{split}": task_scores(model, tokenizer, task, split, n)
        for task in text.TASKS
        for split in text.SPLITS
        if (task, split) != ("one-hop", "held_out")
    }


@torch.no_grad()
def mlp_values(model: LlamaForCausalLM, ids: Tensor) -> tuple[Layers, Layers]:
    """Inputs and outputs of all MLPs on one batch, without the leading position of each row."""
    inputs: Layers = {}
    outputs: Layers = {}
    handles = []
    for layer, block in enumerate(model.model.layers):

        def keep(_: Any, args: tuple[Tensor], output: Tensor, layer: int = layer) -> None:
            inputs[layer] = args[0][:, LEADING:].flatten(0, 1)
            outputs[layer] = output[:, LEADING:].flatten(0, 1)

        handles.append(block.mlp.register_forward_hook(keep))
    model.model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return inputs, outputs


def written(modules: Modules, activations: Layers, layer: int) -> Tensor:
    """What the features of all layers add to one layer's MLP output, without bias and skip."""
    own = modules[layer]
    if isinstance(own, Transcoder):
        return activations[layer] @ own.W_dec
    total = torch.zeros_like(activations[layer][..., :1])
    for source, module in modules.items():
        if source <= layer and isinstance(module, CrossLayerPart):
            total = total + module.contribution(activations[source], layer, sparse=False)
    return total


@contextmanager
def replaced(model: LlamaForCausalLM, modules: Modules) -> Iterator[None]:
    """Runs the model with all MLP outputs, from the second position on, from transcoders."""
    active: Layers = {}
    handles = []
    for layer, module in modules.items():

        def swap(
            _: Any, args: tuple[Tensor], output: Tensor, layer: int = layer, module: Any = module
        ) -> Tensor:
            active[layer] = module.encode(args[0])
            new = written(modules, active, layer) + module.b_dec + module.skip(args[0])
            return torch.cat([output[:, :LEADING], new[:, LEADING:]], dim=1)

        handles.append(model.model.layers[layer].mlp.register_forward_hook(swap))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mean_outputs(modules: Modules, outputs: Layers) -> dict[int, Transcoder]:
    """Transcoders that write the mean MLP output whatever they read: the worst case to beat."""
    means = {}
    for layer, module in modules.items():
        means[layer] = Transcoder(module.config.replace(skip=False, cross_layer=False)).float()
        means[layer].b_dec.data.copy_(outputs[layer].mean(0))
    return means


@torch.no_grad()
def set_scores(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    modules: Modules,
    ids: Tensor,
    n: int = 500,
) -> dict[str, Any]:
    """What a set of transcoders reaches on token ids (batch, pos) and on `n` prompts per task.

    Returns:
        Per layer `fvu` (mean-centred), `l0` and the number of features that are `dead` on this
        text; for all MLPs replaced at once `ce_increase`, `kl` and the scores of the `tasks`.
        `ce_increase_mean_output` is what replacing them by their mean outputs costs.
    """
    inputs, outputs = mlp_values(model, ids)
    active = {layer: module.encode(inputs[layer]) for layer, module in modules.items()}
    scores: dict[str, Any] = {"fvu": [], "l0": [], "dead": []}
    for layer, module in modules.items():
        error = outputs[layer] - written(modules, active, layer)
        error = error - module.b_dec - module.skip(inputs[layer])
        variance = (outputs[layer] - outputs[layer].mean(0)).square().sum()
        scores["fvu"].append(round((error.square().sum() / variance).item(), 4))
        scores["l0"].append(round((active[layer] > 0).float().sum(-1).mean().item(), 2))
        scores["dead"].append(int((~(active[layer] > 0).any(0)).sum()))
    run = model(input_ids=ids, labels=ids)
    scores["ce"] = round(run.loss.item(), 4)
    with replaced(model, modules):
        new = model(input_ids=ids, labels=ids)
        scores["tasks"] = all_scores(model, tokenizer, n)
    with replaced(model, mean_outputs(modules, outputs)):
        worst = model(input_ids=ids, labels=ids).loss.item()
    scores["ce_increase"] = round(new.loss.item() - run.loss.item(), 4)
    scores["ce_increase_mean_output"] = round(worst - run.loss.item(), 4)
    old_log, new_log = run.logits.log_softmax(-1), new.logits.log_softmax(-1)
    scores["kl"] = round((old_log.exp() * (old_log - new_log)).sum(-1).mean().item(), 4)
    return scores
