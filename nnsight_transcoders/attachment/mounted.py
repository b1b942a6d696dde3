"""The envoy of the mounted transcoders, and what becomes of it on a server.

Here it is a part of the model's tree like any other. When nnsight sends a request that mentions an
attached model, this envoy travels as plain data with the text of the modules that bring it to life
there (``remote_layers.py``), since a module that was mounted here has no counterpart in the
server's model.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Mapping
from typing import Any

import nnsight
from nnsight.intervention.envoy import Envoy
from torch import nn

from nnsight_transcoders import errors
from nnsight_transcoders.errors import PayloadTooLargeError
from nnsight_transcoders.remote import loader
from nnsight_transcoders.remote.loader import run_shipped
from nnsight_transcoders.remote.payload import megabytes
from nnsight_transcoders.remote.server import RemoteServer
from nnsight_transcoders.remote.shipping import entry_of, shipped_sources
from nnsight_transcoders.site_stream import norm_to_probe
from nnsight_transcoders.sites import Sites
from nnsight_transcoders.transcoder import dtype_name

from . import feature_edits
from .remote_layers import build
from .replacement import Replacement
from .splices import Splice, run_splices

logger = logging.getLogger(__name__)


class MountedTranscoders(Envoy):
    """``replaced.transcoders``: indexed by layer.

    Args:
        model: The model that transcoders were attached to.
        edited: The copy that carries them.
        sites: Its sites.
        replacements: Layer -> what is mounted.

    Attributes:
        max_bytes: Largest weights that are sent to a server with a request.
    """

    def __init__(
        self, model: Any, edited: Any, sites: Sites, replacements: Mapping[int, Replacement]
    ) -> None:
        mounted = nn.ModuleDict({str(layer): r for layer, r in replacements.items()})
        super().__init__(
            mounted,
            path=f"{model.path}.transcoders",
            interleaver=model.interleaver,
            parent=edited,
        )
        self.layers = tuple(replacements)
        self.max_bytes = RemoteServer().max_bytes
        self._sites, self._replacements = sites, dict(replacements)
        self._splices: list[Splice] | None = None
        self._without_weights = None
        self._norms = {
            layer: norm_to_probe(model._module, sites, layer)
            for layer, replacement in replacements.items()
            if replacement.input_site == "N0"
        }
        if getattr(model, "dispatched", True):
            self._splices = self._built(model._module)
        else:
            self._without_weights = weakref.ref(model)

    def run(self, edited: Any) -> None:
        """The body of the stored edit, where the weights are here."""
        if self._splices is None:
            self._weights_came(edited)
            self._splices = self._built(edited._module)
        run_splices(edited, self._splices)

    def _built(self, module: nn.Module) -> list[Splice]:
        found = self._replacements.items()
        return [Splice.build(module, self._sites, layer, r) for layer, r in found]

    def _weights_came(self, edited: Any) -> None:
        """nnsight has loaded the weights for the copy that runs: the model that it was made from
        takes them as well, and the transcoders go where they are."""
        model = None if self._without_weights is None else self._without_weights()
        if model is not None:
            own = {"_edits", "_children", "transcoders", "_transcoder_edit"}
            model.__dict__.update({k: v for k, v in edited.__dict__.items() if k not in own})
            model._children = [child for child in edited._children if child is not self]
        for layer, replacement in self._replacements.items():
            block = edited._module.get_submodule(self._sites.layers[layer].block)
            device = next(block.parameters()).device
            if replacement.transcoder.W_enc.device != device:
                replacement.transcoder = copy.deepcopy(replacement.transcoder).to(device)
                replacement.below = copy.deepcopy(replacement.below).to(device)

    # -- on the way to a server ------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        data = self._plain()
        n_bytes = sum(
            weight.nbytes for part in data["parts"].values() for weight in part["state"].values()
        )
        if n_bytes > self.max_bytes:
            raise PayloadTooLargeError(
                f"the transcoders of layers {list(self.layers)} have {megabytes(n_bytes)}, more "
                f"than is sent with a request ({megabytes(self.max_bytes)}). Attach fewer layers; "
                "attach single features (features={layer: [numbers]} with mode='replace+error' or "
                "'observe'), which sends their rows only; or read features with read_features(), "
                "which sends none. To send them all the same: replaced.transcoders.max_bytes = ..."
            )
        rows = any(r.feature_numbers is not None for r in self._replacements.values())
        logger.info(
            "sending the transcoders of layers %s to the server: %s of %s",
            list(self.layers),
            megabytes(n_bytes),
            "encoder and decoder rows" if rows else "whole weights",
        )
        # The helpers are named by the user's block, and errors by them: cloudpickle sends modules
        # that are registered as text instead of as names that the server would have to know.
        for module in (loader, feature_edits, errors):
            nnsight.register(module)
        return run_shipped, (shipped_sources(build), entry_of(build), (data,))

    def _plain(self) -> dict[str, Any]:
        """The mounted transcoders as tensors, strings and numbers."""
        parts, layers = {}, []
        for layer, r in self._replacements.items():
            splice = Splice(self._sites.layers[layer], r, self._sites.parallel, None)
            layers.append(
                {
                    "layer": layer,
                    "mode": r.mode,
                    "numbers": r.feature_numbers,
                    "below": [int(part.config.layer) for part in r.below],  # type: ignore[union-attr]
                    "norm": self._norms.get(layer),
                    "residual": splice.residual,
                    "mlp_in": self._sites.layers[layer].mlp_in,
                    "output": splice.output,
                }
            )
            own = r.transcoder
            parts[layer] = {
                "config": own.config.replace(extra={}, dtype=dtype_name(own.W_enc.dtype)).to_dict(),
                "targets": getattr(own, "targets", None),
                "state": {k: v.detach().cpu() for k, v in own.state_dict().items()},
            }
        return {"path": self.path, "layers": layers, "parts": parts}
