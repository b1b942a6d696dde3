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

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from torch import nn

from .errors import SiteError

ValueLayout = Literal["separate", "concatenated", "grouped"]

# Names the Hugging Face models give to parts that structure alone does not tell apart.
_ATTENTION = ("attn", "attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "ff")
_VALUE = ("v_proj", "value", "value_proj", "v", "wv")
_QUERY_KEY = ("q_proj", "k_proj", "query", "key", "query_proj", "key_proj", "q", "k", "wq", "wk")
_FUSED: dict[str, ValueLayout] = {
    "c_attn": "concatenated",
    "qkv_proj": "concatenated",
    "qkv": "concatenated",
    "Wqkv": "concatenated",
    "query_key_value": "grouped",
}
_NORM_BEFORE_ATTENTION = (
    "input_layernorm",
    "ln_1",
    "ln_attn",
    "self_attn_layer_norm",
    "pre_attention_layernorm",
    "attention_norm",
    "norm1",
    "norm_1",
    "ln1",
)
_NORM_BEFORE_MLP = (
    "pre_feedforward_layernorm",
    "ln_2",
    "ln_mlp",
    "final_layer_norm",
    "pre_mlp_layernorm",
    "ffn_norm",
    "norm2",
    "norm_2",
    "ln2",
    "post_attention_layernorm",
)
_NORM_AFTER_ATTENTION = ("post_attention_layernorm", "post_self_attn_layernorm")
_NORM_AFTER_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm")
_POSITION = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
_PARALLEL_FLAGS = ("use_parallel_residual", "parallel_attn", "new_decoder_architecture")


@dataclass(frozen=True)
class LayerSites:
    """The parts of one block, as module paths from the model's root.

    Attributes:
        block: The block itself; its input is the residual stream.
        attention: The module that returns ``(output, pattern)`` under eager attention.
        value: The module that makes the values, alone or fused with queries and keys.
        value_layout: How its output is divided: only values; ``[q | k | v]``; or per value head
            ``[q ... q, k, v]``.
        out_proj: The attention's output projection.
        mlp: The MLP module, for messages.
        mlp_in: The module whose input is N1 (the MLP, or its first linear map).
        mlp_out: The module whose output is O (the MLP, or its last linear map).
        attention_norm: The norm before attention, if any.
        attention_post_norm: The norm on attention's output, if any.
        mlp_norm: The norm before the MLP, if any.
        mlp_post_norm: The norm on the MLP's output, if any.
    """

    block: str
    attention: str
    value: str
    value_layout: ValueLayout
    out_proj: str
    mlp: str
    mlp_in: str
    mlp_out: str
    attention_norm: str | None
    attention_post_norm: str | None
    mlp_norm: str | None
    mlp_post_norm: str | None


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
    blocks = _get(module, blocks_path)
    if not isinstance(blocks, nn.ModuleList):
        raise SiteError(
            f"blocks={blocks_path!r} is no list of blocks but {type(blocks).__name__}\n"
            f"{_tree(module)}"
        )
    layer_fields = {f.name for f in fields(LayerSites)}
    for_layers = {k: overrides.pop(k) for k in list(overrides) if k in layer_fields}
    parallel = overrides.pop("parallel", None)
    layers = tuple(
        _layer_sites(module, f"{blocks_path}.{i}", i, config, for_layers)
        for i in range(len(blocks))
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


def _get(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise SiteError(f"the model has no module {path!r}\n{_tree(module)}") from error


def _find_blocks(module: nn.Module, config: Any) -> str:
    """The list of blocks: a ModuleList of the config's length whose items hold an attention."""
    n_layers = getattr(config, "num_hidden_layers", None)
    found = [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList)
        and len(child) == n_layers
        and _child(child[0], _ATTENTION, inside=True)
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
            f"Pass it: resolve_sites(model, blocks='path.to.blocks')\n{_tree(module)}"
        )
    return found[0]


def _child(block: nn.Module, names: tuple[str, ...], *, inside: bool = False) -> str | None:
    """The first of ``names`` that is a direct child's name.

    With ``inside``: that occurs in the name of a child that has weights and is no norm.
    """
    for wanted in names:
        for name, child in block.named_children():
            if name == wanted:
                return name
            has_weights = any(True for _ in child.parameters())
            if inside and wanted in name and has_weights and not _is_norm(block, name):
                return name
    return None


def _is_norm(block: nn.Module, name: str) -> bool:
    return "norm" in type(block.get_submodule(name)).__name__.lower()


def _layer_sites(
    module: nn.Module, path: str, layer: int, config: Any, overrides: Mapping[str, str | None]
) -> LayerSites:
    block = _get(module, path)
    given = {k: v and v.format(layer=layer) for k, v in overrides.items()}

    def missing(part: str) -> SiteError:
        return SiteError(
            f"could not find {part} in block {path} ({type(block).__name__}). Pass it: "
            f"resolve_sites(model, {part}='{path.rpartition('.')[0]}.{{layer}}....')\n"
            f"{_tree(block, path)}"
        )

    parts: dict[str, Any] = {"block": path, **_norms(block, path, config, given)}
    parts.update(_attention_parts(block, path, missing, given))
    parts.update(_mlp_parts(block, path, missing, given))
    parts.update(given)
    layout = parts["value_layout"]
    if layout not in get_args(ValueLayout):
        known = ", ".join(get_args(ValueLayout))
        raise SiteError(f"value_layout must be one of {known}, got {layout!r}")
    for name, part in parts.items():
        if name != "value_layout" and not (part is None and name.endswith("norm")):
            _get(module, str(part))
    return LayerSites(**parts)


def _norms(
    block: nn.Module, path: str, config: Any, given: Mapping[str, str | None]
) -> dict[str, str | None]:
    """The four norms by role. ``post_attention_layernorm`` is the one name with two meanings: it
    precedes the MLP, unless the block has feed-forward norms of its own (Gemma 2/3, OLMo 2).
    ``given`` norms need no role found for them."""
    if getattr(config, "do_layer_norm_before", True) is False:
        raise SiteError(
            f"{path} applies its norms to the residual stream itself (do_layer_norm_before=False); "
            "the residual stream is then no sum of the parts' outputs, which attribution needs\n"
            f"{_tree(block, path)}"
        )
    if getattr(config, "apply_residual_connection_post_layernorm", False):
        raise SiteError(
            f"{path} adds its parts to the normalised stream "
            "(apply_residual_connection_post_layernorm=True), which is not supported\n"
            f"{_tree(block, path)}"
        )
    names = {name for name, _ in block.named_children() if _is_norm(block, name)}
    after_mlp = next((n for n in _NORM_AFTER_MLP if n in names), None)
    sandwiched = after_mlp is not None or "pre_feedforward_layernorm" in names
    after_attention = (
        next((n for n in _NORM_AFTER_ATTENTION if n in names), None) if sandwiched else None
    )
    before_attention = next((n for n in _NORM_BEFORE_ATTENTION if n in names), None)
    left = names - {after_mlp, after_attention, before_attention}
    before_mlp = next((n for n in _NORM_BEFORE_MLP if n in left), None)
    left -= {before_mlp, *(part.removeprefix(f"{path}.") for part in given.values() if part)}
    if left:
        raise SiteError(
            f"block {path} has norms whose role is not known: {', '.join(sorted(left))}. Pass "
            f"mlp_norm=, attention_norm=, mlp_post_norm= or attention_post_norm=\n"
            f"{_tree(block, path)}"
        )
    # One norm before both: parallel blocks of Falcon-7B, GPT-J, Phi-2, parallel StableLM.
    if before_mlp is None and after_mlp is None:
        before_mlp = before_attention
    roles = {
        "attention_norm": before_attention,
        "attention_post_norm": after_attention,
        "mlp_norm": before_mlp,
        "mlp_post_norm": after_mlp,
    }
    return {role: f"{path}.{name}" if name else None for role, name in roles.items()}


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _attention_parts(
    block: nn.Module, path: str, missing: Any, given: Mapping[str, str]
) -> dict[str, Any]:
    name = _child(block, _ATTENTION, inside=True)
    if name is None and "attention" not in given:
        raise missing("attention")
    attention = given.get("attention", f"{path}.{name}")
    inner = _get(block, attention.removeprefix(f"{path}."))
    # GPT-Neo wraps the module that does the work in one that only forwards the call.
    linears = [n for n, child in inner.named_children() if _is_linear(child)]
    while not linears and len(list(inner.children())) == 1:
        name, inner = next(inner.named_children())
        attention = f"{attention}.{name}"
        linears = [n for n, child in inner.named_children() if _is_linear(child)]
    value = next((n for n in _VALUE if n in linears), None)
    fused = next((n for n in _FUSED if n in linears), None)
    if value is None and fused is None and "value" not in given:
        raise missing("value")
    outs = [n for n in linears if n not in (*_VALUE, *_QUERY_KEY, *_FUSED)]
    if len(outs) != 1 and "out_proj" not in given:
        raise missing("out_proj")
    layout = "separate" if value else _FUSED.get(fused or "", "separate")
    return {
        "attention": attention,
        "value": f"{attention}.{value or fused}",
        "value_layout": layout,
        "out_proj": f"{attention}.{outs[0]}" if outs else "",
    }


def _mlp_parts(
    block: nn.Module, path: str, missing: Any, given: Mapping[str, str]
) -> dict[str, str]:
    children = dict(block.named_children())
    name = given["mlp"].removeprefix(f"{path}.") if "mlp" in given else _child(block, _MLP)
    if name is None and "fc1" in children and "fc2" in children:  # OPT has no MLP module
        return {"mlp": f"{path}.fc1", "mlp_in": f"{path}.fc1", "mlp_out": f"{path}.fc2"}
    if name is None:
        if {"mlp_in", "mlp_out"} <= set(given):
            return {"mlp": given["mlp_in"], "mlp_in": given["mlp_in"], "mlp_out": given["mlp_out"]}
        raise missing("mlp")
    mlp, module = f"{path}.{name}", _get(block, name)
    # Bloom hands the residual into the MLP, which adds it: the MLP proper is between its linears.
    if "residual" in inspect.signature(type(module).forward).parameters:
        linears = [n for n, child in module.named_children() if _is_linear(child)]
        if len(linears) != 2:
            raise missing("mlp_out")
        return {"mlp": mlp, "mlp_in": f"{mlp}.{linears[0]}", "mlp_out": f"{mlp}.{linears[1]}"}
    return {"mlp": mlp, "mlp_in": mlp, "mlp_out": mlp}


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
    position = _child(owner, _POSITION)
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
    norms = [name for name in names if _is_norm(owner, name)]
    blocks = names.index(blocks_path.rpartition(".")[2])
    after = [name for name in norms if names.index(name) > blocks]
    found = after or [name for name in norms if "final" in name]
    if len(found) != 1:
        raise SiteError(
            f"could not find the final norm beside {blocks_path}. Pass it: "
            f"resolve_sites(model, final_norm='...')\n{_tree(owner, owner_path)}"
        )
    return found[0]


def _heads(module: nn.Module, config: Any, layer: LayerSites, d_model: int) -> dict[str, int]:
    """Numbers and width of the heads, from the shapes: the config's head_dim is often left out."""
    n_heads = _first(config, "num_attention_heads", "n_head", "num_heads")
    out_proj: Any = module.get_submodule(layer.out_proj)
    value: Any = module.get_submodule(layer.value)
    head_dim = (sum(out_proj.weight.shape) - d_model) // n_heads
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


def _tree(module: nn.Module, path: str = "", depth: int = 3) -> str:
    """The module tree as text, list items collapsed to the first."""
    lines = [f"module tree of {path or 'the model'} ({type(module).__name__}):"]

    def walk(parent: nn.Module, indent: int) -> None:
        items = list(parent.named_children())
        if isinstance(parent, nn.ModuleList):
            items = items[:1]
        for name, child in items:
            more = f" x {len(child)}" if isinstance(child, nn.ModuleList) else ""
            lines.append(f"{'  ' * indent}{name}: {type(child).__name__}{more}")
            if indent < depth + 2:
                walk(child, indent + 1)

    walk(module, 1)
    return "\n".join(lines[:120])
