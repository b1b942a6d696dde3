"""Interventions on errors and tokens, features that are read, and code that travels."""

from __future__ import annotations

import pytest
import torch
from intervention_support import ALL, KINDS, close, graph_of, some
from setups import IDS

from nnsight_transcoders import attach, attribute
from nnsight_transcoders.circuits.grouping import number_of
from nnsight_transcoders.sites import resolve_sites

# -- errors and tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_without_errors_and_with_transcoders_it_is_the_replacement_model(kind: str) -> None:
    nn_model, chosen, graph = graph_of("gemma2", kind)
    errors = tuple(graph.of_kind("error").tolist())
    found = graph.intervene(
        {errors: 0}, nn_model, chosen, freeze_attention=False, mlps="transcoders"
    )
    replaced = attach(nn_model, chosen)
    with torch.no_grad():
        with replaced.trace(torch.tensor([IDS])):
            logits = replaced.get(resolve_sites(nn_model).unembed).output.save()
    close(found.logits_after, logits[0, -1], 1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2", "opt"])
def test_another_token_is_a_tokens_embedding_multiplied(name: str) -> None:
    """Against the model run on embeddings that were changed by hand."""
    nn_model, chosen, graph = graph_of(name, "per-layer")
    token = graph.of_kind("token")[3].item()
    found = graph.intervene({token: -1.5}, nn_model, chosen, freeze_attention=False)
    sites, first = resolve_sites(nn_model), resolve_sites(nn_model).layers[0].block
    with torch.no_grad():
        with nn_model.trace(torch.tensor([IDS])):
            if sites.position_embed is None:
                nn_model.get(first).input[0, 3] *= -1.5
            else:
                nn_model.get(sites.embed).output[0, 3] *= -1.5
            logits = nn_model.get(sites.unembed).output.save()
    close(found.logits_after, logits[0, -1], 1e-6)


def test_an_error_of_a_layer_without_transcoder() -> None:
    """All that its MLP writes."""
    nn_model, chosen, _ = graph_of("gemma2", "per-layer")
    some_layers = chosen.subset([0])
    graph = attribute(nn_model, some_layers, IDS)
    error = number_of(graph, f"1_error_{len(IDS) - 1}")
    found = graph.intervene({error: 0}, nn_model, some_layers, constrained=ALL)
    at = graph.is_target
    close(found.measured[at], -graph.adjacency()[at, error].double())
    free = graph.intervene({error: 0}, nn_model, some_layers, freeze_attention=False)
    with torch.no_grad():
        with nn_model.trace(torch.tensor([IDS])):
            nn_model.get(resolve_sites(nn_model).layers[1].mlp_post_norm).output[0, -1] = 0
            logits = nn_model.get(resolve_sites(nn_model).unembed).output.save()
    close(free.logits_after, logits[0, -1], 1e-6)


# -- as on a server (more in tests/remote) -------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "input_site", "output_site"),
    [
        ("gpt2", "N0", "O"),  # values fused with queries and keys; positions embedded apart
        ("falcon-new", "N1", "O"),  # attention and MLP side by side
        ("gemma2", "N0", "O'"),  # sandwich norms, soft-capped logits
        ("bloom", "R", "O"),  # an attention that adds the residual stream
    ],
)
def test_code_that_travels_does_the_same(name: str, input_site: str, output_site: str) -> None:
    nn_model, chosen, graph = graph_of(
        name, "cross-layer", input_site=input_site, output_site=output_site
    )
    changes = dict.fromkeys(some(graph, 2), -2.0)
    changes |= {graph.of_kind(kind)[-1].item(): 0.5 for kind in ("error", "token")}
    for options in ({}, {"freeze_attention": False, "mlps": "transcoders"}):
        found, expected = (
            graph.intervene(changes, nn_model, chosen, remote=remote, **options)
            for remote in ("local", None)
        )
        close(found.measured[graph.is_target], expected.measured[graph.is_target], 1e-8)
        close(found.probabilities_after, expected.probabilities_after, 1e-8)


# -- what is read --------------------------------------------------------------------------------


def test_only_features_asked_for_are_read() -> None:
    nn_model, chosen, graph = graph_of("llama", "cross-layer")
    changed, read = graph.of_kind("feature")[0].item(), graph.of_kind("feature")[-1].item()
    graph = graph.named(supernodes={"read": [read]})
    whole = graph.intervene({changed: 0}, nn_model, chosen)
    found = graph.intervene({changed: 0}, nn_model, chosen, read=["read"])
    numbers = (~found.after.isnan()).nonzero().flatten().tolist()
    assert numbers == sorted([changed, read, *graph.of_kind("logit").tolist()])
    close(found.after[numbers], whole.after[numbers], 1e-10)


def test_features_that_compete() -> None:
    nn_model, chosen, graph = graph_of("llama", "skip", activation="topk", k=4)
    number = some(graph)[1]
    found = graph.intervene({number: 1 + 1e-6}, nn_model, chosen, mlps="transcoders")
    close(found.measured[graph.is_target], found.predicted[graph.is_target], 1e-4)
    close(found.before[graph.kind == 0], graph.value[graph.kind == 0])
