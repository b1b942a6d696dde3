"""Where things are in a model: found from its module tree and config, not from its name.

Every decoder-only Hugging Face model is a list of blocks around a residual stream; what differs is
how the parts are called, which norms surround them, and whether attention and MLP run one after
the other or side by side. ``resolve_sites`` finds all of it from the tree alone (no weights, no
forward pass, so a model on the meta device will do). What it finds is checked against numbers when
a run is collected (``circuits/collect.py``).

The five sites of published transcoders:

====  ===============================================================
R     raw residual stream, before the norm that precedes the MLP
N0    after that norm's division, before its gain and bias
N1    the MLP's input (after the gain)
O     the MLP's output
O'    the same after the norm that follows the MLP (Gemma 2/3, OLMo 2), else O
====  ===============================================================
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from .blocks import (
    LayerSites,
    find_child,
    get_part,
    has_attention,
    is_norm,
    layer_sites,
    module_tree,
)
from .errors import SiteError

_POSITION = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
_PARALLEL_FLAGS = ("use_parallel_residual", "parallel_attn", "new_decoder_architecture")


@dataclass(frozen=True)
class Sites:
    """Where things are in one model. Print it to see.

    Attributes:
        layers: One ``LayerSites`` per block.
        embed: The token embedding.
        position_embed: A separate, learned position embedding, if any.
        final_norm: The norm before the unembedding.
        unembed: The unembedding (``lm_head``).
        parallel: Whether attention and MLP read the same residual value (GPT-NeoX, Falcon).
        d_model: Width of the residual stream.
        n_heads: Query heads per layer.
        n_value_heads: Value heads per layer (fewer under grouped-query attention).
        head_dim: Width of a head.
        max_positions: Longest prompt the model takes, if the config says.
        vocab_size: Rows of the token embedding.
    """

    layers: tuple[LayerSites, ...]
    embed: str
    position_embed: str | None
    final_norm: str
    unembed: str
    parallel: bool
    d_model: int
    n_heads: int
    n_value_heads: int
    head_dim: int
    max_positions: int | None
    vocab_size: int

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    def __str__(self) -> str:
        lines = [
            f"Sites: {self.n_layers} layers, d_model={self.d_model}, {self.n_heads} heads of "
            f"{self.head_dim} ({self.n_value_heads} value heads), "
            f"{'parallel' if self.parallel else 'sequential'} attention and MLP",
            f"  embed: {self.embed}" + (f" + {self.position_embed}" if self.position_embed else ""),
        ]
        first = self.layers[0]
        lines += [
            f"  layer 0 {f.name}: {getattr(first, f.name)}"
            for f in fields(first)
            if getattr(first, f.name) is not None
        ]
        return "\n".join([*lines, f"  final_norm: {self.final_norm}", f"  unembed: {self.unembed}"])


def resolve_sites(model: Any, **overrides: Any) -> Sites:
    """Find the parts of a decoder-only Hugging Face model.

    Args:
        model: An nnsight model, or the Hugging Face module itself.
        **overrides: What to use instead of what would be found. Fields of ``Sites`` by name
            (``final_norm="model.norm"``, ``parallel=True``); fields of ``LayerSites`` as paths
            with ``{layer}`` (``mlp_out="model.layers.{layer}.mlp.down_proj"``), and
            ``blocks="model.layers"``.

    Raises:
        SiteError: A part was not found; the message shows the module tree that was looked at and
            how to pass the part.
    """
    module = model if isinstance(model, nn.Module) else model._module
    overrides = dict(overrides)
    config = _text_config(module)
    blocks_path = overrides.pop("blocks", None) or _find_blocks(module, config)
    blocks = get_part(module, blocks_path)
    if not isinstance(blocks, nn.ModuleList):
        raise SiteError(
            f"blocks={blocks_path!r} is no list of blocks but {type(blocks).__name__}\n"
            f"{module_tree(module)}"
        )
    layer_fields = {f.name for f in fields(LayerSites)}
    for_layers = {k: overrides.pop(k) for k in list(overrides) if k in layer_fields}
    parallel = overrides.pop("parallel", None)
    layers = tuple(
        layer_sites(module, f"{blocks_path}.{i}", i, config, for_layers) for i in range(len(blocks))
    )
    if parallel is None:
        parallel = _is_parallel(config, layers[0])
    sites = _model_sites(module, config, blocks_path, layers, parallel, overrides.get("final_norm"))
    unknown = set(overrides) - {f.name for f in fields(Sites)}
    if unknown:
        raise SiteError(
            f"unknown site name(s) {', '.join(sorted(unknown))}; known: blocks, "
            f"{', '.join(f.name for f in (*fields(Sites), *fields(LayerSites)))}"
        )
    return replace(sites, **overrides)


def _text_config(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    if config is None:
        raise SiteError(
            f"{type(module).__name__} has no Hugging Face config: pass a decoder-only "
            "transformers model"
        )
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _find_blocks(module: nn.Module, config: Any) -> str:
    """The list of blocks: a ModuleList of the config's length whose items hold an attention."""
    n_layers = getattr(config, "num_hidden_layers", None)
    found = [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and len(child) == n_layers and has_attention(child[0])
    ]
    # A multimodal model has a vision tower too: the decoder is the one beside the embedding.
    embed = getattr(module, "get_input_embeddings", lambda: None)()
    if len(found) > 1 and embed is not None:
        owners = {n.rpartition(".")[0] for n, child in module.named_modules() if child is embed}
        found = [name for name in found if name.rpartition(".")[0] in owners] or found
    if len(found) != 1:
        what = "no list" if not found else f"several lists ({', '.join(found)})"
        raise SiteError(
            f"found {what} of {n_layers} blocks with attention in {type(module).__name__}. "
            f"Pass it: resolve_sites(model, blocks='path.to.blocks')\n{module_tree(module)}"
        )
    return found[0]


def _is_parallel(config: Any, first: LayerSites) -> bool:
    if first.mlp_norm is not None and first.mlp_norm == first.attention_norm:
        return True
    return any(bool(getattr(config, flag, False)) for flag in _PARALLEL_FLAGS)


def _model_sites(
    module: nn.Module,
    config: Any,
    blocks_path: str,
    layers: tuple[LayerSites, ...],
    parallel: bool,
    final_norm: str | None,
) -> Sites:
    paths = {id(child): name for name, child in module.named_modules()}
    embed = _embedding(module, "get_input_embeddings")
    unembed = _embedding(module, "get_output_embeddings")
    owner_path = blocks_path.rpartition(".")[0]
    owner = module.get_submodule(owner_path) if owner_path else module
    prefix = f"{owner_path}." if owner_path else ""
    if final_norm is None:
        final_norm = f"{prefix}{_final_norm(owner, owner_path, blocks_path)}"
    position = find_child(owner, _POSITION)
    d_model = embed.weight.shape[1]
    return Sites(
        layers=layers,
        embed=paths[id(embed)],
        position_embed=f"{prefix}{position}" if position else None,
        final_norm=final_norm,
        unembed=paths[id(unembed)],
        parallel=parallel,
        d_model=d_model,
        **_heads(module, config, layers[0], d_model),
        max_positions=_first(config, "max_position_embeddings", "n_positions", default=None),
        vocab_size=embed.weight.shape[0],
    )


def _embedding(module: nn.Module, getter: str) -> Any:
    found = getattr(module, getter, lambda: None)()
    if found is None:
        raise SiteError(
            f"{type(module).__name__}.{getter}() gives nothing: load the model with its language "
            "modelling head (AutoModelForCausalLM, task='text-generation')"
        )
    return found


def _final_norm(owner: nn.Module, owner_path: str, blocks_path: str) -> str:
    """The norm beside the blocks; Bloom has one after the embedding as well, before the blocks."""
    names = [name for name, _ in owner.named_children()]
    norms = [name for name in names if is_norm(owner, name)]
    blocks = names.index(blocks_path.rpartition(".")[2])
    after = [name for name in norms if names.index(name) > blocks]
    found = after or [name for name in norms if "final" in name]
    if len(found) != 1:
        raise SiteError(
            f"could not find the final norm beside {blocks_path}. Pass it: "
            f"resolve_sites(model, final_norm='...')\n{module_tree(owner, owner_path)}"
        )
    return found[0]


def _heads(module: nn.Module, config: Any, layer: LayerSites, d_model: int) -> dict[str, int]:
    """Numbers and width of the heads, from the shapes: the config's head_dim is often left out."""
    n_heads = _first(config, "num_attention_heads", "n_head", "num_heads")
    out_proj: Any = module.get_submodule(layer.out_proj)
    head_dim = (sum(out_proj.weight.shape) - d_model) // n_heads
    value_heads = n_heads
    if layer.value is not None:
        value: Any = module.get_submodule(layer.value)
        value_heads = (sum(value.weight.shape) - d_model) // head_dim
    if layer.value_layout != "separate":
        value_heads = (value_heads - n_heads) // 2
    return {"n_heads": n_heads, "n_value_heads": value_heads, "head_dim": head_dim}


def _first(config: Any, *names: str, default: Any = ...) -> Any:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    if default is ...:
        raise SiteError(f"{type(config).__name__} says none of {', '.join(names)}")
    return default
