"""The parts of one transformer block, found by the names Hugging Face models use and by shape.

``sites.py`` finds the blocks and everything around them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from .errors import SiteError

ValueLayout = Literal["separate", "concatenated", "grouped"]

# Names the Hugging Face models give to parts that structure alone does not tell apart.
_ATTENTION = ("attn", "attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "ff")
_VALUE = ("v_proj", "value", "value_proj", "v", "wv")
_QUERY_KEY = ("q_proj", "k_proj", "query", "key", "query_proj", "key_proj", "q", "k", "wq", "wk")
_OUT = ("o_proj", "out_proj", "c_proj", "dense", "wo")
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
_NORM_AFTER_ATTENTION = ("post_self_attn_layernorm", "post_attention_layernorm")
_NORM_AFTER_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm")


@dataclass(frozen=True)
class LayerSites:
    """The parts of one block, as module paths from the model's root.

    Attributes:
        block: The block itself; its input is the residual stream.
        attention: The module that returns ``(output, pattern)`` under eager attention.
        value: The module that makes the values, alone or fused with queries and keys; None where
            no one module does (multi-head latent attention), which only autograd can express.
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
    value: str | None
    value_layout: ValueLayout
    out_proj: str
    mlp: str
    mlp_in: str
    mlp_out: str
    attention_norm: str | None
    attention_post_norm: str | None
    mlp_norm: str | None
    mlp_post_norm: str | None


def layer_sites(
    module: nn.Module, path: str, layer: int, config: Any, overrides: Mapping[str, str | None]
) -> LayerSites:
    """Find the parts of the block at ``path``.

    Args:
        module: The model.
        path: The block's path.
        layer: Its number, for ``{layer}`` in overrides.
        config: The model's config.
        overrides: Fields of ``LayerSites`` to use instead of what would be found.

    Raises:
        SiteError: A part was not found, or an override names none.
    """
    block = get_part(module, path)
    given = {k: v and v.format(layer=layer) for k, v in overrides.items()}

    def missing(part: str) -> SiteError:
        return SiteError(
            f"could not find {part} in block {path} ({type(block).__name__}). Pass it: "
            f"resolve_sites(model, {part}='{path.rpartition('.')[0]}.{{layer}}....')\n"
            f"{module_tree(block, path)}"
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
        optional = name == "value" or name.endswith("norm")
        if name != "value_layout" and not (part is None and optional):
            get_part(module, str(part))
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
            f"{module_tree(block, path)}"
        )
    if getattr(config, "apply_residual_connection_post_layernorm", False):
        raise SiteError(
            f"{path} adds its parts to the normalised stream "
            "(apply_residual_connection_post_layernorm=True), which is not supported\n"
            f"{module_tree(block, path)}"
        )
    names = {name for name, _ in block.named_children() if is_norm(block, name)}
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
            f"{module_tree(block, path)}"
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
    block: nn.Module, path: str, missing: Any, given: Mapping[str, Any]
) -> dict[str, Any]:
    name = find_child(block, _ATTENTION, inside=True)
    if name is None and "attention" not in given:
        raise missing("attention")
    attention = given.get("attention", f"{path}.{name}")
    inner = get_part(block, attention.removeprefix(f"{path}."))
    # GPT-Neo wraps the module that does the work in one that only forwards the call.
    linears = [n for n, child in inner.named_children() if _is_linear(child)]
    while not linears and len(list(inner.children())) == 1:
        name, inner = next(inner.named_children())
        attention = f"{attention}.{name}"
        linears = [n for n, child in inner.named_children() if _is_linear(child)]
    value = next((n for n in _VALUE if n in linears), None)
    fused = next((n for n in _FUSED if n in linears), None)
    made = value or fused
    # Multi-head latent attention makes values in two steps with a norm between them.
    if made is None and "value" not in given and not hasattr(inner, "kv_lora_rank"):
        raise missing("value")
    known = {*_VALUE, *_QUERY_KEY, *_FUSED, (given.get("value") or "").rpartition(".")[2]}
    outs = [n for n in linears if n in _OUT] or [n for n in linears if n not in known]
    if len(outs) != 1 and "out_proj" not in given:
        raise missing("out_proj")
    layout = "separate" if value else _FUSED.get(fused or "", "separate")
    return {
        "attention": attention,
        "value": f"{attention}.{made}" if made else None,
        "value_layout": layout,
        "out_proj": f"{attention}.{outs[0]}" if outs else "",
    }


def _mlp_parts(
    block: nn.Module, path: str, missing: Any, given: Mapping[str, Any]
) -> dict[str, str]:
    children = dict(block.named_children())
    name = given["mlp"].removeprefix(f"{path}.") if "mlp" in given else find_child(block, _MLP)
    if name is None and "fc1" in children and "fc2" in children:  # OPT has no MLP module
        return {"mlp": f"{path}.fc1", "mlp_in": f"{path}.fc1", "mlp_out": f"{path}.fc2"}
    if name is None:
        if {"mlp_in", "mlp_out"} <= set(given):
            return {"mlp": given["mlp_in"], "mlp_in": given["mlp_in"], "mlp_out": given["mlp_out"]}
        raise missing("mlp")
    mlp, module = f"{path}.{name}", get_part(block, name)
    # Bloom hands the residual into the MLP, which adds it: the MLP proper is between its linears.
    if "residual" in inspect.signature(type(module).forward).parameters:
        linears = [n for n, child in module.named_children() if _is_linear(child)]
        if len(linears) != 2:
            raise missing("mlp_out")
        return {"mlp": mlp, "mlp_in": f"{mlp}.{linears[0]}", "mlp_out": f"{mlp}.{linears[1]}"}
    # GPT-OSS returns the router's scores as well: its output is that of its experts.
    if {name for name, _ in module.named_children()} == {"router", "experts"}:
        return {"mlp": mlp, "mlp_in": mlp, "mlp_out": f"{mlp}.experts"}
    return {"mlp": mlp, "mlp_in": mlp, "mlp_out": mlp}


def has_attention(block: nn.Module) -> bool:
    """Whether one of a block's children is an attention."""
    return find_child(block, _ATTENTION, inside=True) is not None


def find_child(block: nn.Module, names: tuple[str, ...], *, inside: bool = False) -> str | None:
    """The first of ``names`` that is a direct child's name.

    With ``inside``: that occurs in the name of a child that has weights and is no norm.
    """
    for wanted in names:
        for name, child in block.named_children():
            if name == wanted:
                return name
            has_weights = any(True for _ in child.parameters())
            if inside and wanted in name and has_weights and not is_norm(block, name):
                return name
    return None


def is_norm(block: nn.Module, name: str) -> bool:
    """Whether a block's child is a norm, by its class."""
    return "norm" in type(block.get_submodule(name)).__name__.lower()


def get_part(module: nn.Module, path: str) -> nn.Module:
    """The module at a path.

    Raises:
        SiteError: There is none; the message shows the tree.
    """
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise SiteError(f"the model has no module {path!r}\n{module_tree(module)}") from error


def module_tree(module: nn.Module, path: str = "", depth: int = 3) -> str:
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
