"""Tiny random models of every architecture the package promises, and a tokenizer for them."""

from __future__ import annotations

from functools import cache
from typing import Any

import nnsight
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

VOCAB, D_MODEL, N_LAYERS, N_HEADS, D_MLP, CONTEXT = 97, 32, 3, 4, 64, 64

_GQA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": D_MLP,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_PLAIN: dict[str, Any] = {k: v for k, v in _GQA.items() if k != "num_key_value_heads"}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": D_MODEL,
    "n_layer": N_LAYERS,
    "n_head": N_HEADS,
    "n_positions": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FALCON: dict[str, Any] = {
    k: v for k, v in _PLAIN.items() if k not in ("intermediate_size", "max_position_embeddings")
}
_WIDE_HEADS = {**_GQA, "head_dim": 16}
_GEMMA = {**_WIDE_HEADS, "query_pre_attn_scalar": 16, "sliding_window": 4}
_MOE = {**_GQA, "num_experts_per_tok": 2, "experts_implementation": "eager"}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", _GPT2),
    "gpt-neox": ("GPTNeoXConfig", {**_PLAIN, "use_parallel_residual": True}),
    "gpt-neox-sequential": ("GPTNeoXConfig", {**_PLAIN, "use_parallel_residual": False}),
    "llama": ("LlamaConfig", _GQA),
    "mistral": ("MistralConfig", {**_GQA, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", _GQA),
    "qwen3": ("Qwen3Config", _WIDE_HEADS),
    "gemma": ("GemmaConfig", _WIDE_HEADS),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3TextConfig", _GEMMA),
    "phi3": ("Phi3Config", _GQA),
    "olmo2": ("Olmo2Config", _GQA),
    "smollm": ("LlamaConfig", {**_GQA, "tie_word_embeddings": True}),
    "gpt-neo": (
        "GPTNeoConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": D_MODEL,
            "num_layers": N_LAYERS,
            "num_heads": N_HEADS,
            "intermediate_size": D_MLP,
            "max_position_embeddings": CONTEXT,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "opt": (
        "OPTConfig",
        {
            **{k: v for k, v in _PLAIN.items() if k != "intermediate_size"},
            "ffn_dim": D_MLP,
            "word_embed_proj_dim": D_MODEL,
        },
    ),
    "stablelm": ("StableLmConfig", _GQA),
    "stablelm-parallel": ("StableLmConfig", {**_GQA, "use_parallel_residual": True}),
    "falcon": ("FalconConfig", _FALCON),
    "falcon-new": (
        "FalconConfig",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon-alibi": (
        "FalconConfig",
        {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
    "bloom": (
        "BloomConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": D_MODEL,
            "n_layer": N_LAYERS,
            "n_head": N_HEADS,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "mixtral": ("MixtralConfig", {**_MOE, "num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {**_MOE, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 16},
    ),
}
ARCHITECTURES = list(CONFIGS)


def hf_model(
    name: str, *, dtype: torch.dtype = torch.float32, attention: str = "eager", seed: int = 0
) -> torch.nn.Module:
    """A tiny random model. Every parameter is perturbed, so that no bias or gain stays trivial."""
    cls, options = CONFIGS[name]
    options = dict(options)
    experts = options.pop("experts_implementation", None)
    config = getattr(transformers, cls)(**options)
    torch.manual_seed(seed)
    kwargs = {} if experts is None else {"experts_implementation": experts}
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, **kwargs
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.to(dtype)


@cache
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A word tokenizer over ``w3 ... w96`` with ``<pad> <bos> <eos>``."""
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCAB))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def nnsight_model(name: str, **options: Any) -> Any:
    """The same as an nnsight ``TransformersModel`` with a tokenizer."""
    return nnsight.TransformersModel(
        hf_model(name, **options), task="text-generation", tokenizer=tokenizer()
    )
