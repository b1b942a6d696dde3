"""Logit effects and de-embeddings against the products written out, and against the model."""

from __future__ import annotations

import pytest
import torch
from setups import model, run, transcoders

from nnsight_transcoders import attribute
from nnsight_transcoders.circuits.weights import de_embeddings, feature_details, logit_effects


def demeaned(values: torch.Tensor) -> torch.Tensor:
    return values - values.mean(-1, keepdim=True)


def test_gpt2_products() -> None:
    """LayerNorm with gain before the unembedding, encoder behind ln_2's gain."""
    module, chosen = model("gpt2")._module, transcoders("gpt2", "per-layer")
    features = [3, 0, 17]
    decoder = chosen[1].W_dec.detach()[features]
    gain = module.transformer.ln_f.weight.detach()
    expected = (demeaned(decoder) * gain) @ module.lm_head.weight.detach().T
    found = logit_effects(model("gpt2"), chosen, 1, features)
    assert torch.allclose(found, demeaned(expected), atol=1e-5)
    encoder = chosen[1].W_enc.detach()[features] * module.transformer.h[1].ln_2.weight.detach()
    expected = demeaned(encoder) @ module.transformer.wte.weight.detach().T
    assert torch.allclose(de_embeddings(model("gpt2"), chosen, 1, features), expected, atol=1e-5)


def test_gemma2_passes_the_norm_behind_the_mlp() -> None:
    module = model("gemma2")._module
    for site, gain in (
        ("O", 1 + module.model.layers[1].post_feedforward_layernorm.weight),
        ("O'", 1.0),
    ):
        chosen = transcoders("gemma2", "per-layer", output_site=site)
        decoder = chosen[1].W_dec.detach()[[5]] * gain * (1 + module.model.norm.weight)
        expected = demeaned(decoder.detach() @ module.lm_head.weight.detach().T)
        assert torch.allclose(logit_effects(model("gemma2"), chosen, 1, [5]), expected, atol=1e-5)


@pytest.mark.parametrize("input_site", ["R", "N0", "N1"])
def test_de_embedding_by_input_site(input_site: str) -> None:
    module = model("llama")._module
    chosen = transcoders("llama", "per-layer", input_site=input_site)
    gain = module.model.layers[0].post_attention_layernorm.weight if input_site == "N1" else 1.0
    expected = (chosen[0].W_enc.detach()[[2]] * gain) @ module.model.embed_tokens.weight.T
    found = de_embeddings(model("llama"), chosen, 0, [2])
    assert torch.allclose(found, expected.detach(), atol=1e-5)


@pytest.mark.parametrize("kind", ["per-layer", "cross-layer"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt-neox"])
def test_edge_of_a_last_layer_feature_is_its_logit_effect(name: str, kind: str) -> None:
    """At the last layer nothing else is between a feature and the logits at its own position: the
    edge is activation x effect / denominators of the run."""
    _, the_run = run(name)
    chosen = transcoders(name, kind, output_site="O'")
    graph = attribute(model(name), chosen, the_run.token_ids, targets=[5, 9])
    logits = graph.of_kind("logit")
    last = len(graph.tokens) - 1
    ratios = []
    for node in graph.nodes():
        if node.kind == "feature" and node.layer == 2 and node.position == last:
            effect = logit_effects(model(name), chosen, 2, [node.index])[0, [5, 9]]
            edges = graph.adjacency()[logits, node.number]
            ratios += (edges / (effect * node.value)).tolist()
    assert len(ratios) > 4
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-3)


def test_feature_details() -> None:
    nn_model, chosen = model("llama"), transcoders("llama", "per-layer")
    graph = attribute(nn_model, chosen, "w3 w40 w7").prune(0.99)
    details = feature_details(nn_model, chosen, graph, top=3)
    node = graph.node(int(graph.of_kind("feature")[0]))
    found = details[f"{node.layer}_{node.index}"]
    effects = logit_effects(nn_model, chosen, node.layer, [node.index])[0]
    assert found["top_logits"][0][1] == pytest.approx(float(effects.max()))
    assert found["bottom_logits"][0][1] == pytest.approx(float(effects.min()))
    assert found["top_logits"][0][0] == nn_model.tokenizer.decode([int(effects.argmax())])
    assert {len(rows) for rows in found.values()} == {3}
    assert graph.to_html(feature_details=details)
