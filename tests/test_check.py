"""``check`` on the promised architectures' neighbours, and what its report says when it fails."""

from __future__ import annotations

import json
from typing import Any

import nnsight
import pytest
import torch
import transformers
import zoo

from nnsight_transcoders.check import CheckReport, CheckRow, check, random_transcoders
from nnsight_transcoders.circuits.collect import collect
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.sites import resolve_sites

_SHAPE: dict[str, Any] = {
    "vocab_size": zoo.VOCAB,
    "hidden_size": zoo.D_MODEL,
    "num_hidden_layers": zoo.N_LAYERS,
    "num_attention_heads": zoo.N_HEADS,
    "intermediate_size": zoo.D_MLP,
    "max_position_embeddings": zoo.CONTEXT,
    "pad_token_id": 0,
}
_GQA = {**_SHAPE, "num_key_value_heads": 2}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 3,
    "n_group": 1,
    "topk_group": 1,
}

#: Name -> config class, options, and whether the explicit operator can express it.
NEIGHBOURS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "olmo": ("OlmoConfig", _GQA, True),
    "glm4": ("Glm4Config", {**_GQA, "head_dim": 8}, True),
    "phi": ("PhiConfig", _SHAPE, True),
    "cohere": ("CohereConfig", _GQA, True),
    "gpt-oss": (
        "GptOssConfig",
        {**_GQA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        True,
    ),
    "granite": ("GraniteConfig", {**_GQA, "residual_multiplier": 0.5}, False),
    "deepseek": ("DeepseekV3Config", {**_SHAPE, **_LATENT}, False),
}


def neighbour(name: str) -> Any:
    cls, options, _ = NEIGHBOURS[name]
    torch.manual_seed(0)
    config = getattr(transformers, cls)(**options)
    return nnsight.NNsight(
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    )


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbouring_architectures(name: str) -> None:
    """Norms without an epsilon, two post-norms, shared norms, experts, attention sinks; and two
    that only autograd expresses: scaled residual branches and multi-head latent attention."""
    report = check(neighbour(name))
    assert report.ok, report.rows
    by_operator = any("operator agrees" in row.name for row in report.rows)
    assert by_operator == NEIGHBOURS[name][2]
    assert by_operator or any("autograd is used" in row.note for row in report.rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype(dtype: torch.dtype) -> None:
    assert check(zoo.nnsight_model("llama", dtype=dtype)).ok


def test_report_is_json() -> None:
    report = check(zoo.nnsight_model("gpt2"), kinds=["per-layer"])
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["ok"] is True
    assert {row["name"] for row in data["rows"]} == {row.name for row in report.rows}
    assert data["sites"]["final_norm"] == "transformer.ln_f"


def test_a_row_over_its_limit_fails_the_report() -> None:
    good, bad, unknown = (CheckRow("x", value, 1e-4) for value in (1e-5, 1e-3, None))
    sites = resolve_sites(zoo.hf_model("gpt2"))
    assert CheckReport("m", sites, (good,)).ok
    assert not CheckReport("m", sites, (good, bad)).ok
    assert not CheckReport("m", sites, (good, unknown)).ok


def test_random_transcoders_are_at_the_models_scale() -> None:
    model = zoo.nnsight_model("llama")
    run = collect(model, resolve_sites(model), torch.tensor([3, 9, 40, 12, 66]))
    for kind in ("per-layer", "skip", "cross-layer"):
        chosen = random_transcoders(run, kind, d_transcoder=512)
        again = random_transcoders(run, kind, d_transcoder=512)
        pre = chosen[1].pre_activations(run.mlp_in[1])
        assert 0.7 < float(pre.std()) < 1.4
        assert torch.equal(chosen[1].W_enc, again[1].W_enc)
    with pytest.raises(InputError, match="unknown kind"):
        random_transcoders(run, "sideways")  # type: ignore[arg-type]
