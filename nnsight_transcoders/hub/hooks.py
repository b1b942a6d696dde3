"""TransformerLens hook names and this package's sites: how foreign configs name places."""

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

_BLOCK = re.compile(r"^blocks\.[^.]*\.")


def input_site(hook: object, where: str) -> InputSite:
    """``"blocks.3.ln2.hook_normalized"`` -> ``"N0"``.

    Raises:
        CheckpointError: A hook that is not known as an input.
    """
    return cast(InputSite, _lookup(hook, INPUT_HOOKS, where, "input"))


def output_site(hook: object, where: str) -> OutputSite:
    """``"hook_mlp_out"`` -> ``"O'"``.

    Raises:
        CheckpointError: A hook that is not known as an output.
    """
    return cast(OutputSite, _lookup(hook, OUTPUT_HOOKS, where, "output"))


def hook_names(input_site: InputSite, output_site: OutputSite) -> tuple[str, str]:
    """The hooks of a pair of sites, as a foreign config names them."""
    reads = {site: hook for hook, site in reversed(INPUT_HOOKS.items())}
    writes = {site: hook for hook, site in OUTPUT_HOOKS.items()}
    return reads[input_site], writes[output_site]


def _lookup(hook: object, table: Mapping[str, str], where: str, side: str) -> str:
    name = _BLOCK.sub("", str(hook))
    if hook is None or name not in table:
        problem = f"does not name the {side} hook" if hook is None else f"names the hook {hook!r}"
        raise CheckpointError(
            f"{where} {problem}; known {side} hooks are {', '.join(table)}. Say where it "
            f"{'reads' if side == 'input' else 'writes'} with {side}_site=, one of "
            f"{', '.join(dict.fromkeys(table.values()))}"
        )
    return table[name]
