"""A two-layer model whose one multi-hop path is known: token, feature, head, feature, logit."""

from __future__ import annotations

import nnsight
import pytest
import torch
import transformers

from nnsight_transcoders import (
    CircuitRun,
    Transcoder,
    TranscoderConfig,
    TranscoderSet,
    attribute,
    top_paths,
)

D, VOCAB, N_HEADS, HEAD_DIM = 16, 10, 2, 8
KEY, ANSWER = 3, 7
IDS = [KEY, 1, 2, 1]
# Directions of the residual stream: what the key token is, what feature A writes, what the head
# turns it into, what feature B writes. The others hold the tokens apart.
IS_KEY, WROTE_A, MOVED, WROTE_B = range(4)


def model() -> nnsight.NNsight:
    """A Llama without queries and keys (heads attend evenly), with one moving head and no MLPs."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=N_HEADS,
        intermediate_size=8,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    module = transformers.LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        for token in range(VOCAB):
            module.model.embed_tokens.weight[token, 4 + token] = 1.0
        module.model.embed_tokens.weight[KEY, IS_KEY] = 2.0
        attention = module.model.layers[1].self_attn
        attention.v_proj.weight[HEAD_DIM, WROTE_A] = 1.0  # head 1, its first component
        attention.o_proj.weight[MOVED, HEAD_DIM] = 3.0
        module.lm_head.weight[ANSWER, WROTE_B] = 1.0
    return nnsight.NNsight(module)


def transcoders() -> TranscoderSet:
    """Layer 0's feature A: key -> WROTE_A. Layer 1's feature B: MOVED -> WROTE_B."""
    modules = {}
    for layer, (read, write) in enumerate([(IS_KEY, WROTE_A), (MOVED, WROTE_B)]):
        config = TranscoderConfig(D, D, 2, layer=layer, dtype="float64")
        module = Transcoder(config)
        with torch.no_grad():
            module.W_enc[0, read] = 1.0
            module.W_dec[0, write] = 5.0
            module.b_enc[1] = -100.0  # the second feature never fires
        modules[layer] = module
    return TranscoderSet.from_transcoders(modules)


class Replaced(torch.nn.Module):
    """The transcoder as the model's own MLP, so that the path exists in the model."""

    def __init__(self, transcoder: Transcoder) -> None:
        super().__init__()
        self.transcoder = transcoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.transcoder(x)


def built() -> tuple[nnsight.NNsight, TranscoderSet]:
    nn_model, chosen = model(), transcoders()
    for layer, block in enumerate(nn_model._module.model.layers):
        block.mlp = Replaced(chosen[layer])
    return nnsight.NNsight(nn_model._module), chosen


def test_the_path_is_found_and_is_the_whole_logit() -> None:
    nn_model, chosen = built()
    circuit = CircuitRun.collect(nn_model, chosen, IDS)
    target = circuit.token(ANSWER)
    paths = [p for p in top_paths(circuit, target, depth=6, per_node=5, beam=50) if p.ended]
    best = paths[0]
    found = [(step.kind, step.layer, step.position) for step in best.steps]
    assert found == [("feature", 1, 3), ("attention", 1, 0), ("feature", 0, 0), ("token", -1, 0)]
    assert best.steps[1].index == 1  # the head that was built to move it
    assert best.value == pytest.approx(circuit.total(target), rel=1e-6)
    assert sum(abs(p.value) for p in paths[1:]) < 1e-6 * abs(best.value)


def test_its_value_is_what_the_model_computes_by_hand() -> None:
    """Every factor written out: norms at the run's denominators, attention a quarter each."""
    nn_model, chosen = built()

    def rms(x: torch.Tensor) -> float:
        return float(x.pow(2).mean().add(1e-6).sqrt())

    embedding = nn_model._module.model.embed_tokens.weight.detach()
    first = embedding[KEY].clone()
    a = 2.0 / rms(first)
    first[WROTE_A] += 5.0 * a
    last = embedding[IDS[-1]].clone()
    last[MOVED] += 3.0 * 0.25 * (5.0 * a) / rms(first)
    b = float(last[MOVED]) / rms(last)
    last[WROTE_B] += 5.0 * b
    by_hand = 5.0 * b / rms(last) * (1 - 1 / VOCAB)
    circuit = CircuitRun.collect(nn_model, chosen, IDS)
    assert circuit.total(circuit.token(ANSWER)) == pytest.approx(by_hand, rel=1e-5)


def test_the_graph_has_the_two_hops_and_no_more() -> None:
    nn_model, chosen = built()
    graph = attribute(nn_model, chosen, IDS, targets=[ANSWER])
    assert graph.completeness_error < 1e-6
    pruned = graph.prune()
    hops = {
        (pruned.node(s).id, pruned.node(t).id)
        for s, t in zip(pruned.source.tolist(), pruned.target.tolist(), strict=True)
    }
    assert hops == {("E_3_0", "0_0_0"), ("0_0_0", "1_0_3"), ("1_0_3", "L_7_3")}
    assert graph.replacement_score == pytest.approx(1.0)
