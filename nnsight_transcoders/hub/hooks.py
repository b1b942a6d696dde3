"""Hook names and this package's sites: how foreign configs name places.

TransformerLens names (``blocks.3.ln2.hook_normalized``), and paths of Hugging Face modules
(``model.layers.3.pre_feedforward_layernorm.output``). Of the latter only those are known that mean
the same in every model: ``post_attention_layernorm`` comes before the MLP in Llama, but belongs to
the attention in Gemma.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.transcoder import InputSite, OutputSite

#: Where a transcoder reads. ``hook_mlp_in`` is the residual stream before the norm, too.
INPUT_HOOKS: dict[str, InputSite] = {
    "hook_resid_mid": "R",
    "hook_mlp_in": "R",
    "ln2.hook_normalized": "N0",
    "mlp.hook_in": "N1",
}
#: Where its output goes.
OUTPUT_HOOKS: dict[str, OutputSite] = {"mlp.hook_out": "O", "hook_mlp_out": "O'"}

#: The same for paths of modules; a path without ``.input`` or ``.output`` means the output.
MODULE_INPUTS: dict[str, InputSite] = {
    "pre_feedforward_layernorm.input": "R",
    "pre_feedforward_layernorm.output": "N1",
    "ln_2.input": "R",
    "ln_2.output": "N1",
    "mlp.input": "N1",
}
MODULE_OUTPUTS: dict[str, OutputSite] = {
    "mlp.output": "O",
    "post_feedforward_layernorm.output": "O'",
}

_BLOCK = re.compile(r"^blocks\.[^.]*\.")
_MODULE = re.compile(r"^(?:[A-Za-z_]+\.)*(?:layers|h|blocks)\.\d+\.")
_LAYER = re.compile(r"(?:^|\.)(?:blocks|layers|h)\.(\d{1,4})(?:\.|$)")


def input_site(hook: object, where: str) -> InputSite:
    """``"blocks.3.ln2.hook_normalized"`` -> ``"N0"``.

    Raises:
        CheckpointError: A hook that is not known as an input.
    """
    return cast(InputSite, _lookup(hook, INPUT_HOOKS, MODULE_INPUTS, where, "input"))


def output_site(hook: object, where: str) -> OutputSite:
    """``"hook_mlp_out"`` -> ``"O'"``.

    Raises:
        CheckpointError: A hook that is not known as an output.
    """
    return cast(OutputSite, _lookup(hook, OUTPUT_HOOKS, MODULE_OUTPUTS, where, "output"))


def hook_layer(hook: object) -> int | None:
    """``"blocks.3.hook_mlp_out"`` -> 3; None where a name has no layer in it."""
    match = _LAYER.search(hook) if isinstance(hook, str) else None
    return int(match[1]) if match else None


def hook_names(input_site: InputSite, output_site: OutputSite) -> tuple[str, str]:
    """The hooks of a pair of sites, as a foreign config names them."""
    reads = {site: hook for hook, site in reversed(INPUT_HOOKS.items())}
    writes = {site: hook for hook, site in OUTPUT_HOOKS.items()}
    return reads[input_site], writes[output_site]


def _lookup(
    hook: object, table: Mapping[str, str], modules: Mapping[str, str], where: str, side: str
) -> str:
    name = _BLOCK.sub("", str(hook))
    path = _MODULE.sub("", str(hook))
    if hook is not None and name in table:
        return table[name]
    if path != str(hook):
        path = path if path.endswith((".input", ".output")) else f"{path}.output"
        if path in modules:
            return modules[path]
    problem = f"does not name the {side} hook" if hook is None else f"names the hook {hook!r}"
    raise CheckpointError(
        f"{where} {problem}; known {side} hooks are {', '.join((*table, *modules))}. Say where it "
        f"{'reads' if side == 'input' else 'writes'} with {side}_site=, one of "
        f"{', '.join(dict.fromkeys(table.values()))}"
    )
