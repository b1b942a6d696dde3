"""Where a set's weights come from: what a checkpoint format has to provide, and sources in memory.

``TranscoderSet`` (``sets.py``) asks a ``LayerSource`` for layers and rows and knows no format; the
formats under ``hub/`` are sources over files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor

from .transcoder import CrossLayerPart, Transcoder, TranscoderConfig

Rows = Literal["encoder", "decoder"]


class LayerSource(Protocol):
    """Where a set's weights come from: what a checkpoint format has to provide.

    Attributes:
        configs: Layer -> config, known without reading any weight.
        provenance: Repository, revision, files, format, folds applied: JSON-ready.
    """

    @property
    def configs(self) -> Mapping[int, TranscoderConfig]: ...

    @property
    def provenance(self) -> Mapping[str, Any]: ...

    def load(self, layer: int) -> Transcoder | CrossLayerPart:
        """The layer's module on the CPU in its stored dtype."""
        ...

    def rows(self, layer: int, indices: Tensor, which: Rows) -> Tensor:
        """Encoder rows ``(n, d_in)`` or decoder rows ``(n, d_out)`` / ``(n, n_targets, d_out)``."""
        ...


class MemorySource:
    """Transcoders that are already in memory, as a ``LayerSource``."""

    def __init__(
        self,
        modules: Mapping[int, Transcoder | CrossLayerPart],
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self._modules = dict(sorted(modules.items()))
        self.configs = {layer: module.config for layer, module in self._modules.items()}
        self.provenance = dict(provenance or {"format": "memory"})

    def load(self, layer: int) -> Transcoder | CrossLayerPart:
        return self._modules[layer]

    def rows(self, layer: int, indices: Tensor, which: Rows) -> Tensor:
        module = self._modules[layer]
        weight = module.W_enc if which == "encoder" else module.W_dec
        return weight.detach()[indices]


class Subset:
    """A ``LayerSource`` restricted to some layers of another one."""

    def __init__(self, source: LayerSource, layers: Sequence[int]) -> None:
        self._source = source
        self.configs = {layer: source.configs[layer] for layer in layers}
        self.provenance = source.provenance

    def load(self, layer: int) -> Transcoder | CrossLayerPart:
        return self._source.load(layer)

    def rows(self, layer: int, indices: Tensor, which: Rows) -> Tensor:
        return self._source.rows(layer, indices, which)
