"""Uploading: repository, files, card, branch, pull request, refusals."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import ModelCard

from nnsight_transcoders.errors import CheckpointError, InputError
from nnsight_transcoders.hub.card import MARKER
from nnsight_transcoders.sets import TranscoderSet

from .checkpoints import make_set
from .hub_server import TOKEN, HubServer


def test_round_trip_through_the_hub(hub: HubServer) -> None:
    original = make_set(activation="jumprelu", skip=True, base_model="openai-community/gpt2")
    url = original.push_to_hub("me/set", token=TOKEN, license="mit", metrics={0: {"l0": 3.5}})
    repo = hub.repos["me/set"]
    assert url == f"{hub.url}/me/set/commit/{repo.refs['main']}"
    assert not repo.private
    names = {"config.json", "README.md", *(f"layer_{i}.safetensors" for i in range(3))}
    assert names <= set(repo.commits[repo.refs["main"]])

    loaded = TranscoderSet.from_pretrained("me/set")
    x = torch.randn(4, 6)
    for layer in original.layers:
        assert torch.equal(loaded[layer](x), original[layer](x))
    assert loaded.provenance["repository"] == "me/set"
    assert loaded.provenance["revision"] == repo.refs["main"]

    card = ModelCard(repo.commits[repo.refs["main"]]["README.md"].decode())
    assert card.data.library_name == "nnsight-transcoders"
    assert card.data.base_model == "openai-community/gpt2"
    assert card.data.license == "mit"
    assert card.data.tags == ["transcoder", "mechanistic-interpretability", "circuit-tracing"]
    assert 'from_pretrained("me/set")' in card.text
    assert "| 0 | 3.5 |" in card.text


def test_private_branch_and_pull_request(hub: HubServer) -> None:
    made = make_set()
    made.push_to_hub("me/set", token=TOKEN, private=True, revision="v2")
    repo = hub.repos["me/set"]
    assert repo.private
    assert "config.json" in repo.commits[repo.refs["v2"]]
    assert "config.json" not in repo.commits[repo.refs["main"]]
    url = made.push_to_hub("me/set", token=TOKEN, create_pr=True)
    assert url == f"{hub.url}/me/set/discussions/1"
    assert "config.json" in repo.commits[repo.refs["refs/pr/1"]]
    with pytest.raises(InputError, match="leave out revision"):
        made.push_to_hub("me/set", token=TOKEN, create_pr=True, revision="v2")


def test_a_card_its_author_took_over_stays(hub: HubServer) -> None:
    made = make_set()
    made.push_to_hub("me/set", token=TOKEN, metrics={"ce": 1.0})
    repo = hub.repos["me/set"]
    card = repo.commits[repo.refs["main"]]["README.md"]
    made.push_to_hub("me/set", token=TOKEN, metrics={"ce": 2.0})
    assert repo.commits[repo.refs["main"]]["README.md"] != card

    own = card.replace(MARKER.encode(), b"Written by hand.")
    repo.commit({"README.md": own})
    made.push_to_hub("me/set", token=TOKEN, metrics={"ce": 3.0})
    assert repo.commits[repo.refs["main"]]["README.md"] == own
    assert b'"ce": 3.0' in repo.commits[repo.refs["main"]]["config.json"]


def test_refusal_says_what_to_do(hub: HubServer) -> None:
    with pytest.raises(CheckpointError, match="hf auth login") as caught:
        make_set().push_to_hub("me/set")
    assert caught.value.__cause__ is not None
    assert hub.repos == {}
