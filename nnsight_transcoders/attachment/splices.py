"""The edit that ``attach`` stores: at every step of a run, read each layer's input site, run its
transcoder as a mounted module, and put its output in place.

This is the edit as it runs here. In a remote job there are no mounted modules;
``remote_layers.py`` takes its place there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.intervention.iterator import Iterations
from torch import Tensor, nn

from nnsight_transcoders.blocks import LayerSites
from nnsight_transcoders.norms import NormSpec, probed_spec
from nnsight_transcoders.sites import Sites

from .replacement import Replacement
from .token_index import token_index_of


@dataclass(frozen=True)
class Splice:
    """Where one replacement reads and writes."""

    sites: LayerSites
    replacement: Replacement
    parallel: bool
    norm: NormSpec | None

    @classmethod
    def build(cls, module: nn.Module, sites: Sites, layer: int, replacement: Replacement) -> Splice:
        """Find it in the model."""
        here = sites.layers[layer]
        norm = None
        if replacement.input_site == "N0":
            assert here.mlp_norm is not None
            norm = probed_spec(module, here.mlp_norm, sites.d_model)
        return cls(here, replacement, sites.parallel, norm)

    @property
    def residual(self) -> str | None:
        """The module whose input is the value at site R, where that is read."""
        if self.replacement.input_site not in ("R", "N0"):
            return None
        return self.sites.block if self.parallel else self.sites.mlp_norm

    @property
    def output(self) -> str:
        """The module whose output is the value at the output site."""
        post = self.sites.mlp_post_norm if self.replacement.output_site == "O'" else None
        return post or self.sites.mlp_out

    def run(self, edited: Any, token_index: Tensor, state: dict[int, tuple]) -> None:
        """Inside a trace: read the site, run the transcoder, put its output in place."""
        node, here = edited.transcoders[self.replacement.layer], self.sites
        residual = None if self.residual is None else edited.get(self.residual).input
        mlp_in = edited.get(here.mlp_in).input
        shape = (*token_index.shape, mlp_in.shape[-1])
        x = (mlp_in if residual is None else residual).reshape(shape)
        if self.norm is not None:
            x = self.norm.site_n0(x)
        written = self.output
        if self.replacement.needs_mlp:
            output = edited.get(written).output
            y, *others = output if isinstance(output, tuple) else (output,)
            if self.replacement.reads_output:
                x = y.reshape(shape)
            out = node(x, y.reshape(shape), token_index, state, hook=True).reshape(y.shape)
            if self.replacement.mode != "observe":
                edited.get(written).output = (out, *others) if others else out
            return
        out = node(x, None, token_index, state, hook=True).reshape(mlp_in.shape)
        # Between the first and the last part there is at most an elementwise activation, which
        # takes the MLP's own input as well as anything. A part that holds the last one has to run.
        for path in dict.fromkeys((here.mlp_in, here.mlp_out, written)):
            if not written.startswith(f"{path}.") and not here.mlp_out.startswith(f"{path}."):
                edited.get(path).skip(out if path == written else mlp_in)


def run_splices(edited: Any, splices: Sequence[Splice]) -> None:
    """The body of the edit: every layer, at every step of the run."""
    reached, runs = 0, edited.interleaver.counts
    finished = runs.get("result", 0)
    try:
        for step in Iterations()[:]:
            reached = step
            token_index = token_index_of(*edited.inputs)
            state: dict[int, tuple] = {}
            for splice in splices:
                splice.run(edited, token_index, state)
    except OutOfOrderError:
        # How nnsight ends a loop over all steps: the step after the last never comes. At the first
        # step it means that something was not reached, by a run that was not stopped on purpose.
        if reached == 0 and runs.get("result", 0) > finished:
            raise
