"""The entries of the catalogue (``catalogue``): data only."""

from __future__ import annotations

from dataclasses import replace

from .catalogue import CatalogueEntry


def published() -> tuple[CatalogueEntry, ...]:
    """All entries, in the order of base models."""
    return (*_GPT2_AND_PYTHIA, *_GEMMA_2, *_GEMMA_3, *_LLAMA, *_QWEN, *_OTHERS)


_CLT_SIZE = ("width",)

_GPT2_AND_PYTHIA = (
    CatalogueEntry(
        "pchlenski/gpt2-transcoders",
        "openai-community/gpt2",
        12,
        24576,
        "per-layer",
        "relu",
        "N0 -> O'",
        "dunefsky",
        remark="The paper's own; pickles, read without running them. The target is mean-centred, "
        "as TransformerLens centres writing weights. Trained without BOS on contexts of 128",
    ),
    CatalogueEntry(
        "jacobdunefsky/gpt2small-transcoders",
        "openai-community/gpt2",
        12,
        24576,
        "per-layer",
        "relu",
        "N0 -> O",
        "peek",
        remark="Safe repack; its card reports a mean FVU of 0.149",
    ),
    CatalogueEntry(
        "ctigges/gpt2-clts",
        "openai-community/gpt2",
        12,
        None,
        "cross-layer",
        None,
        None,
        "decode-clt",
        remark="Several sets, one per folder: pass folder=. Those with TopK are refused (they "
        "choose over the batch); norm_stats.json is in the root",
        unverified=("layers",),
    ),
    CatalogueEntry(
        "jacobdunefsky/pythia-2.8B-transcoders",
        "EleutherAI/pythia-2.8b",
        32,
        61440,
        "per-layer",
        "topk k=60, no ReLU",
        "N1 -> O",
        "peek",
        remark="Attention and MLP run in parallel",
    ),
)

_GEMMA_2 = (
    CatalogueEntry(
        "google/gemma-scope-2b-pt-transcoders",
        "google/gemma-2-2b",
        26,
        16384,
        "per-layer",
        "jumprelu",
        "N0 -> O'",
        "gemma-scope",
        "cc-by-4.0",
        "Several sparsities per layer: variant= or l0= chooses. BOS was left out",
        ("licence",),
    ),
    CatalogueEntry(
        "mntss/gemma-scope-transcoders",
        "google/gemma-2-2b",
        26,
        16384,
        "per-layer",
        "jumprelu",
        "N0 -> O'",
        "circuit-tracer",
        remark="No weights of its own: a list of Google's files, one sparsity per layer",
    ),
    CatalogueEntry(
        "mntss/clt-gemma-2-2b-426k",
        "google/gemma-2-2b",
        26,
        16384,
        "cross-layer",
        "relu or jumprelu",
        "R -> O'",
        "circuit-tracer",
        remark="JumpReLU where the files hold thresholds",
        unverified=_CLT_SIZE,
    ),
    CatalogueEntry(
        "mntss/clt-gemma-2-2b-2.5M",
        "google/gemma-2-2b",
        26,
        98304,
        "cross-layer",
        "relu or jumprelu",
        "R -> O'",
        "circuit-tracer",
        remark="JumpReLU where the files hold thresholds. Large: layers load one at a time",
        unverified=_CLT_SIZE,
    ),
)

#: Gemma 3: size -> layers.
_GEMMA_3_LAYERS = {"270m": 18, "1b": 26, "4b": 34, "12b": 48, "27b": 62}


def _gemma_scope_2(size: str, layers: int, kind: str) -> tuple[CatalogueEntry, ...]:
    """The sets of one repository: per layer and, for the small models, cross-layer."""
    plain = size == "270m" and kind == "pt"
    per_layer = CatalogueEntry(
        f"google/gemma-scope-2-{size}-{kind}",
        f"google/gemma-3-{size}{'' if plain else '-' + kind}",
        layers,
        None,
        "per-layer",
        "jumprelu",
        "N1 -> O'",
        "gemma-scope-2",
        "cc-by-4.0",
        "Widths 16k and 262k, L0 small or big, with or without a skip path (affine): width=, l0=, "
        "affine= choose; transcoder/ has four depths only",
        ("layers", "licence"),
    )
    cross_layer = replace(
        per_layer,
        kind="cross-layer",
        remark="folder='clt'. Widths 262k and 524k, L0 medium or big; decoders are indexed by the "
        "layer written to, those to earlier layers must be zero",
    )
    return (per_layer, cross_layer) if size in ("270m", "1b") else (per_layer,)


_GEMMA_3 = (
    *(
        entry
        for size, layers in _GEMMA_3_LAYERS.items()
        for kind in ("pt", "it")
        for entry in _gemma_scope_2(size, layers, kind)
    ),
    CatalogueEntry(
        "mwhanna/gemma-scope-2-*",
        None,
        None,
        None,
        "per-layer",
        "jumprelu",
        "N1 -> O'",
        "circuit-tracer",
        remark="No weights of their own: lists of Google's files. Four leading positions are left "
        "out for instruction-tuned models",
    ),
)

_LLAMA = (
    CatalogueEntry(
        "mntss/transcoder-Llama-3.2-1B",
        "meta-llama/Llama-3.2-1B",
        16,
        131072,
        "skip",
        "relu",
        "R -> O",
        "circuit-tracer",
        remark="The decoder's orientation changed in a later commit; the shapes tell",
    ),
    CatalogueEntry(
        "mntss/clt-llama-3.2-1b-524k",
        "meta-llama/Llama-3.2-1B",
        16,
        32768,
        "cross-layer",
        "relu or jumprelu",
        "R -> O'",
        "circuit-tracer",
        remark="JumpReLU where the files hold thresholds",
        unverified=_CLT_SIZE,
    ),
    CatalogueEntry(
        "EleutherAI/skip-transcoder-Llama-3.2-1B-131k",
        "meta-llama/Llama-3.2-1B",
        16,
        131072,
        "skip",
        "topk",
        "N1 -> O",
        "sparsify",
        unverified=("layers",),
    ),
    CatalogueEntry(
        "facebook/crv-8b-instruct-transcoders",
        "meta-llama/Llama-3.1-8B-Instruct",
        32,
        131072,
        "per-layer",
        "topk k=128, no ReLU",
        "N1 -> O",
        "circuit-tracer",
        remark="k is not in the files: pass k=128",
        unverified=("layers", "width"),
    ),
)

#: Repositories of mwhanna's Qwen3 sets: name -> model, layers.
_QWEN3 = {
    "qwen3-0.6b-transcoders-lowl0": ("Qwen/Qwen3-0.6B", 28),
    "qwen3-1.7b-transcoders-lowl0": ("Qwen/Qwen3-1.7B", 28),
    "qwen3-4b-transcoders": ("Qwen/Qwen3-4B", 36),
    "qwen3-8b-transcoders": ("Qwen/Qwen3-8B", 36),
    "qwen3-14b-transcoders-lowl0": ("Qwen/Qwen3-14B", 40),
}


_QWEN = (
    *(
        CatalogueEntry(
            f"mwhanna/{name}",
            model,
            layers,
            163840,
            "per-layer",
            "relu",
            "N1 -> O",
            "circuit-tracer",
            remark="It has no config.yaml: pass input_site='N1', output_site='O'"
            if "14b" in name
            else "",
            unverified=("layers",),
        )
        for name, (model, layers) in _QWEN3.items()
    ),
    CatalogueEntry(
        "bluelightai/clt-qwen3-*",
        None,
        None,
        None,
        "cross-layer",
        "relu or jumprelu",
        "R -> O'",
        "circuit-tracer",
        remark="JumpReLU where the files hold thresholds",
    ),
    CatalogueEntry(
        "OpenMOSS-Team/Llama-Scope-2-Qwen3-1.7B",
        "Qwen/Qwen3-1.7B",
        28,
        None,
        "per-layer",
        None,
        "N0 -> O'",
        "llamascopium",
        remark="Several sets (8x and 32x, k 64 to 256): pass folder='transcoder/8x/k64'. The "
        "lorsa/ folders replace attention and are refused, and so are gated (GLU) encoders",
        unverified=("layers",),
    ),
    CatalogueEntry(
        "ByteDance-Seed/Cross-Layer-TopK-CLT",
        "Qwen/Qwen3-8B-Base",
        36,
        32768,
        "cross-layer",
        "jointtopk k=360",
        "R -> O",
        "joint-topk",
        remark="Features are chosen over all layers together, so it cannot be attached to a "
        "running model; attribute() and verify() work. 377 GB of float32",
    ),
    CatalogueEntry(
        "sackfield/qwen2.5-0.5b-transcoders",
        "Qwen/Qwen2.5-0.5B",
        24,
        16384,
        "skip",
        "jumprelu",
        "N1 -> O",
        "sackfield",
        unverified=("layers",),
    ),
)

_OTHERS = (
    CatalogueEntry(
        "EleutherAI/skip-transcoder-SmolLM2-135M-128x",
        "HuggingFaceTB/SmolLM2-135M",
        30,
        73728,
        "skip",
        "topk",
        "N1 -> O",
        "sparsify",
        remark="Does not reconstruct without its normalisation constants, which are not published "
        "(relative error 0.8): verify refuses it",
        unverified=("layers", "width"),
    ),
    CatalogueEntry(
        "EleutherAI/*-clt-*",
        None,
        None,
        None,
        "cross-layer",
        "topk, grouptopk",
        "N1 -> O",
        "clt-training",
        remark="Sets with divide_cross_layer, topk_coalesced, batchtopk, a bias after the encoder "
        "or skip paths to later layers are refused",
        unverified=("sites",),
    ),
    CatalogueEntry(
        "mntss/clt-131k",
        "openai/gpt-oss-20b",
        24,
        None,
        "cross-layer",
        "relu or jumprelu",
        "R -> O'",
        "circuit-tracer",
        remark="The output is that of the experts inside the MLP",
        unverified=("layers",),
    ),
    CatalogueEntry(
        "noanabeshima/tiny_model",
        "noanabeshima/tiny_model",
        4,
        None,
        "per-layer",
        "relu",
        "R -> O",
        "tiny-model",
        remark="Torch files, read without running them; variant= chooses (default S-3_R1_P0). The "
        "model is not one of transformers",
    ),
)
