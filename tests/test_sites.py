"""The parts of every architecture, against a table written by hand from the models' source."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers
import zoo
from torch import nn

from nnsight_transcoders.blocks import LayerSites
from nnsight_transcoders.check import random_transcoders
from nnsight_transcoders.circuits.attribution import attribute
from nnsight_transcoders.circuits.collect import collect
from nnsight_transcoders.circuits.freeze import freeze, freeze_norms, mlp_sides
from nnsight_transcoders.errors import SiteError
from nnsight_transcoders.models import hf_module
from nnsight_transcoders.sites import Sites, resolve_sites

IDS = torch.tensor([5, 9, 33, 12, 50])


@dataclass(frozen=True)
class Expected:
    """What must be found; the parts of a block relative to it. Defaults: Llama's names."""

    blocks: str = "model.layers"
    embed: str = "model.embed_tokens"
    position_embed: str | None = None
    final_norm: str = "model.norm"
    attention: str = "self_attn"
    value: str = "v_proj"
    layout: str = "separate"
    out_proj: str = "o_proj"
    mlp: str = "mlp"
    mlp_in: str = "mlp"
    mlp_out: str = "mlp"
    attention_norm: str | None = "input_layernorm"
    attention_post_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    parallel: bool = False
    value_heads: int = 2
    head_dim: int = 8
    max_positions: int | None = 64


LLAMA = Expected()
GEMMA2 = Expected(
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    head_dim=16,
)
GPT2 = Expected(
    blocks="transformer.h",
    embed="transformer.wte",
    position_embed="transformer.wpe",
    final_norm="transformer.ln_f",
    attention="attn",
    value="c_attn",
    layout="concatenated",
    out_proj="c_proj",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    value_heads=4,
)
NEOX = Expected(
    blocks="gpt_neox.layers",
    embed="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    attention="attention",
    value="query_key_value",
    layout="grouped",
    out_proj="dense",
    parallel=True,
    value_heads=4,
)
FALCON = Expected(
    blocks="transformer.h",
    embed="transformer.word_embeddings",
    final_norm="transformer.ln_f",
    attention="self_attention",
    value="query_key_value",
    layout="grouped",
    out_proj="dense",
    mlp_norm="input_layernorm",  # one norm serves both
    parallel=True,
    value_heads=1,
    max_positions=2048,
)
EXPECTED: dict[str, Expected] = {
    "gpt2": GPT2,
    "gpt-neox": NEOX,
    "gpt-neox-sequential": replace(NEOX, parallel=False),
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": replace(LLAMA, head_dim=16),
    "gemma": replace(LLAMA, head_dim=16),
    "gemma2": GEMMA2,
    "gemma3": GEMMA2,
    "phi3": replace(LLAMA, value="qkv_proj", layout="concatenated"),
    "olmo2": replace(
        LLAMA,
        attention_norm=None,
        attention_post_norm="post_attention_layernorm",
        mlp_norm=None,
        mlp_post_norm="post_feedforward_layernorm",
    ),
    "smollm": LLAMA,
    "gpt-neo": replace(
        GPT2, attention="attn.attention", value="v_proj", layout="separate", out_proj="out_proj"
    ),
    "opt": Expected(
        blocks="model.decoder.layers",
        embed="model.decoder.embed_tokens",
        position_embed="model.decoder.embed_positions",
        final_norm="model.decoder.final_layer_norm",
        out_proj="out_proj",
        mlp="fc1",
        mlp_in="fc1",
        mlp_out="fc2",
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        value_heads=4,
    ),
    "stablelm": LLAMA,
    "stablelm-parallel": replace(LLAMA, mlp_norm="input_layernorm", parallel=True),
    "falcon": FALCON,
    "falcon-new": replace(FALCON, attention_norm="ln_attn", mlp_norm="ln_mlp", value_heads=2),
    "falcon-alibi": replace(
        FALCON, mlp_norm="post_attention_layernorm", parallel=False, value_heads=4
    ),
    "bloom": replace(
        FALCON,
        mlp_in="mlp.dense_h_to_4h",
        mlp_out="mlp.dense_4h_to_h",
        mlp_norm="post_attention_layernorm",
        parallel=False,
        value_heads=4,
        max_positions=None,
    ),
    "mixtral": LLAMA,
    "qwen3-moe": replace(LLAMA, head_dim=16),
}


def expected_layer(expected: Expected, layer: int) -> LayerSites:
    """The table's row for one block, with full paths."""
    block = f"{expected.blocks}.{layer}"

    def inside(name: str | None) -> str | None:
        return None if name is None else f"{block}.{name}"

    return LayerSites(
        block=block,
        attention=inside(expected.attention),
        value=inside(f"{expected.attention}.{expected.value}"),
        value_layout=expected.layout,
        out_proj=inside(f"{expected.attention}.{expected.out_proj}"),
        mlp=inside(expected.mlp),
        mlp_in=inside(expected.mlp_in),
        mlp_out=inside(expected.mlp_out),
        attention_norm=inside(expected.attention_norm),
        attention_post_norm=inside(expected.attention_post_norm),
        mlp_norm=inside(expected.mlp_norm),
        mlp_post_norm=inside(expected.mlp_post_norm),
    )


def expected_sites(name: str) -> Sites:
    """The whole of what must be found in one of the zoo's models."""
    expected = EXPECTED[name]
    return Sites(
        layers=tuple(expected_layer(expected, layer) for layer in range(zoo.N_LAYERS)),
        embed=expected.embed,
        position_embed=expected.position_embed,
        final_norm=expected.final_norm,
        unembed="lm_head",
        parallel=expected.parallel,
        d_model=zoo.D_MODEL,
        n_heads=zoo.N_HEADS,
        n_value_heads=expected.value_heads,
        head_dim=expected.head_dim,
        max_positions=expected.max_positions,
        vocab_size=zoo.VOCAB,
    )


# -- what is found -------------------------------------------------------------------------------


def test_the_table_covers_the_zoo():
    assert sorted(EXPECTED) == sorted(zoo.ARCHITECTURES)


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_every_part_is_found(name):
    assert resolve_sites(zoo.hf_model(name)) == expected_sites(name)


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_a_model_without_weights_gives_the_same(name):
    with torch.device("meta"):
        model = zoo.hf_model(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert resolve_sites(model) == expected_sites(name)


def test_an_nnsight_model_gives_the_same_as_the_module_inside():
    model = zoo.nnsight_model("gemma2")
    assert resolve_sites(model) == resolve_sites(model._module) == expected_sites("gemma2")


def test_the_decoder_of_a_multimodal_model_is_found_beside_its_vision_tower():
    text = zoo.CONFIGS["gemma3"][1]
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": zoo.N_LAYERS,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )
    with torch.device("meta"):
        sites = resolve_sites(transformers.Gemma3ForConditionalGeneration(config).eval())
    assert sites.layers[2].mlp_post_norm == (
        "model.language_model.layers.2.post_feedforward_layernorm"
    )
    assert (sites.embed, sites.final_norm, sites.unembed) == (
        "model.language_model.embed_tokens",
        "model.language_model.norm",
        "lm_head",
    )
    assert (sites.n_heads, sites.n_value_heads, sites.head_dim) == (4, 2, 16)


def test_sites_print_what_was_found():
    text = str(resolve_sites(zoo.hf_model("gpt2")))
    for part in ("3 layers", "d_model=32", "4 heads of 8", "sequential", "transformer.wpe"):
        assert part in text
    assert "layer 0 mlp_norm: transformer.h.0.ln_2" in text
    assert "mlp_post_norm" not in text
    assert "parallel attention" in str(resolve_sites(zoo.hf_model("falcon")))


# -- overrides -----------------------------------------------------------------------------------


def test_overrides_replace_what_would_be_found():
    sites = resolve_sites(
        zoo.hf_model("gpt2"),
        mlp_out="transformer.h.{layer}.mlp.c_proj",
        attention_norm=None,
        value_layout="grouped",
        parallel=True,
        final_norm="transformer.h.2.ln_1",
        head_dim=16,
        max_positions=7,
    )
    expected = expected_sites("gpt2")
    layers = tuple(
        replace(
            layer, mlp_out=f"{layer.block}.mlp.c_proj", attention_norm=None, value_layout="grouped"
        )
        for layer in expected.layers
    )
    assert sites == replace(
        expected,
        layers=layers,
        parallel=True,
        final_norm="transformer.h.2.ln_1",
        head_dim=16,
        max_positions=7,
    )


def renamed(name: str, **parts: str) -> nn.Module:
    """A model of the zoo, some parts of whose blocks have been given names nobody has heard of."""
    model = zoo.hf_model(name)
    for block in model.get_submodule(EXPECTED[name].blocks):
        for old, new in parts.items():
            block.add_module(new, block._modules.pop(old))
    return model


def test_a_renamed_attention_is_asked_for_step_by_step_until_all_is_given():
    model = renamed("llama", self_attn="mixing")
    given: dict[str, str] = {}
    for part, path in (
        ("blocks", "model.layers"),
        ("attention", "model.layers.{layer}.mixing"),
    ):
        with pytest.raises(SiteError, match=f"{part}='") as caught:
            resolve_sites(model, **given)
        assert "mixing: LlamaAttention" in str(caught.value)
        given[part] = path
    sites = resolve_sites(model, **given)
    assert sites.layers[1].out_proj == "model.layers.1.mixing.o_proj"


@pytest.mark.parametrize(
    "given",
    [
        {"mlp": "model.layers.{layer}.thinking"},
        {"mlp_in": "model.layers.{layer}.thinking", "mlp_out": "model.layers.{layer}.thinking"},
    ],
)
def test_a_renamed_mlp_can_be_given(given):
    model = renamed("llama", mlp="thinking")
    with pytest.raises(SiteError, match="could not find mlp in block model.layers.0") as caught:
        resolve_sites(model)
    assert "resolve_sites(model, mlp='model.layers.{layer}." in str(caught.value)
    assert "thinking: LlamaMLP" in str(caught.value)
    layer = resolve_sites(model, **given).layers[2]
    assert layer.mlp_in == layer.mlp_out == "model.layers.2.thinking"


def test_a_renamed_norm_can_be_given():
    model = renamed("gemma2", pre_feedforward_layernorm="calming")
    with pytest.raises(SiteError, match="role is not known: calming. Pass mlp_norm=") as caught:
        resolve_sites(model)
    assert "calming: Gemma2RMSNorm" in str(caught.value)
    sites = resolve_sites(model, mlp_norm="model.layers.{layer}.calming")
    assert sites.layers[1] == replace(
        expected_sites("gemma2").layers[1], mlp_norm="model.layers.1.calming"
    )


@pytest.mark.parametrize(
    ("old", "new", "part"), [("v_proj", "content", "value"), ("o_proj", "q", "out_proj")]
)
def test_renamed_projections_can_be_given(old, new, part):
    model = zoo.hf_model("llama")
    for layer in model.model.layers:
        layer.self_attn.add_module(new, layer.self_attn._modules.pop(old))
    with pytest.raises(SiteError, match=f"{part}='model.layers") as caught:
        resolve_sites(model)
    assert f"{new}: Linear" in str(caught.value)
    sites = resolve_sites(model, **{part: f"model.layers.{{layer}}.self_attn.{new}"})
    expected = expected_sites("llama").layers[2]
    assert sites.layers[2] == replace(expected, **{part: f"model.layers.2.self_attn.{new}"})
    assert (sites.n_value_heads, sites.head_dim) == (2, 8)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"blocks": "model.nothing"}, ["'model.nothing'", "embed_tokens: Embedding"]),
        ({"blocks": "model.norm"}, ["'model.norm'", "LlamaRMSNorm", "layers: ModuleList x 3"]),
        ({"mlp_out": "model.layers.{layer}.nothing"}, ["model.layers.0.nothing"]),
        ({"attention": "model.layers.{layer}.nothing"}, ["nothing", "self_attn"]),
        ({"mlp": "model.layers.{layer}.nothing"}, ["nothing", "mlp"]),
        ({"mlp_norm": "model.layers.{layer}.nothing"}, ["model.layers.0.nothing"]),
        ({"value_layout": "sideways"}, ["'sideways'", "grouped"]),
        ({"mlp_inn": "model"}, ["mlp_inn", "mlp_in", "final_norm", "blocks"]),
    ],
)
def test_an_override_that_is_not_there_is_named(given, named):
    with pytest.raises(SiteError) as caught:
        resolve_sites(zoo.hf_model("llama"), **given)
    for text in named:
        assert text in str(caught.value)


def test_latent_attention_has_no_value_module():
    """Only autograd expresses it, so the operator has to be told, also by hand."""
    model = zoo.hf_model("llama")
    assert resolve_sites(model, value=None).layers[0].value is None
    with pytest.raises(SiteError, match="no module that makes the values"):
        freeze_with("llama", value=None)


# -- models that are not understood --------------------------------------------------------------


def small(cls: str, **options: Any) -> Any:
    """A small config of any transformers model."""
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return getattr(transformers, cls)(**(shape | options))


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (
            lambda: transformers.T5ForConditionalGeneration(
                transformers.T5Config(
                    vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
                )
            ),
            ["blocks='", "encoder: T5Stack", "block: ModuleList x 2"],
        ),
        (
            lambda: transformers.BertForMaskedLM(small("BertConfig", intermediate_size=64)),
            ["value='bert.encoder.layer.{layer}.", "attention: BertAttention", "query: Linear"],
        ),
        (
            lambda: transformers.OPTForCausalLM(
                small("OPTConfig", ffn_dim=64, do_layer_norm_before=False, word_embed_proj_dim=32)
            ),
            ["model.decoder.layers.0", "do_layer_norm_before=False", "fc1: Linear"],
        ),
        (
            lambda: transformers.BloomForCausalLM(
                transformers.BloomConfig(
                    vocab_size=50,
                    hidden_size=32,
                    n_layer=2,
                    n_head=4,
                    apply_residual_connection_post_layernorm=True,
                )
            ),
            ["transformer.h.0", "apply_residual_connection_post_layernorm", "mlp: BloomMLP"],
        ),
        (
            lambda: transformers.LlamaModel(small("LlamaConfig", intermediate_size=64)),
            ["LlamaModel", "get_output_embeddings", "AutoModelForCausalLM"],
        ),
        (lambda: nn.Linear(2, 2), ["Linear", "config"]),
    ],
    ids=["t5", "bert", "opt-post-norm", "bloom-post-norm", "headless", "no-config"],
)
def test_a_model_that_is_not_understood_is_refused_with_its_tree_and_a_way_on(model, named):
    with pytest.raises(SiteError) as caught:
        resolve_sites(model())
    for text in named:
        assert text in str(caught.value)


# -- readings that do not fit are caught by numbers ----------------------------------------------


def freeze_with(name: str, **overrides: Any) -> None:
    """Collect a run and freeze it with sites that may be wrong."""
    model = zoo.nnsight_model(name)
    sites = resolve_sites(model, **overrides)
    run = collect(model, sites, IDS)
    norms = freeze_norms(model._module, sites, run)
    sides = mlp_sides(sites, run, norms, random_transcoders(run, "per-layer"))
    freeze(hf_module(model), sites, run, norms, sides)


@pytest.mark.parametrize(
    ("name", "overrides", "named"),
    [
        ("llama", {"parallel": True}, ["model.layers.0.mlp", "parallel="]),
        ("gpt-neox", {"parallel": False}, ["gpt_neox.layers.0", "parallel="]),
        ("stablelm-parallel", {"parallel": False}, ["layers.0.input_layernorm", "parallel="]),
        (
            "llama",
            {"mlp_norm": "model.layers.{layer}.input_layernorm"},
            ["model.layers.0.mlp", "input_layernorm"],
        ),
        ("llama", {"attention_norm": None}, ["model.layers.0.self_attn"]),
        ("gemma2", {"mlp_post_norm": None}, ["model.layers.0", "MLP"]),
        ("gemma2", {"attention_post_norm": None}, ["model.layers.0", "attention"]),
        ("llama", {"final_norm": "model.layers.0.input_layernorm"}, ["layers.0.input_layernorm"]),
        ("llama", {"final_norm": "model.layers.2.mlp"}, ["model.layers.2.mlp"]),
        ("llama", {"final_norm": "lm_head"}, ["lm_head (Linear)", "nor an RMSNorm"]),
        ("llama", {"value": "model.layers.{layer}.self_attn.k_proj"}, ["model.layers.0.self_attn"]),
    ],
)
def test_a_wrong_override_is_caught(name, overrides, named):
    freeze_with(name)
    with pytest.raises(SiteError) as caught:
        freeze_with(name, **overrides)
    for text in named:
        assert text in str(caught.value)


@pytest.mark.parametrize("method", ["operator", "autograd", "auto"])
def test_attribute_does_not_get_past_a_wrong_reading(method):
    model = zoo.nnsight_model("llama")
    run = collect(model, resolve_sites(model), IDS)
    transcoders = random_transcoders(run, "per-layer", input_site="R")
    wrong = resolve_sites(model, parallel=True)
    with pytest.raises(SiteError, match=r"model\.layers\.0\.mlp"):
        attribute(model, transcoders, IDS, sites=wrong, method=method)
