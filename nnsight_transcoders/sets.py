"""``TranscoderSet``: the transcoders of one model, layer by layer, loaded when used.

Opening a set reads headers only. ``set[layer]`` loads a layer and keeps it; ``set.load(layer)``
loads it without keeping it, which is how circuits are traced with sets larger than the memory;
``set.rows`` reads single encoder or decoder rows. Where the weights come from is a ``LayerSource``
(``layer_sources.py``), of which each checkpoint format under ``hub/`` has one; this module knows
none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .activations import keep_joint
from .errors import CheckpointError, ConfigError, InputError, MismatchError
from .layer_sources import LayerSource, MemorySource, Rows, Subset
from .transcoder import (
    CrossLayerPart,
    CrossLayerTranscoder,
    FeatureEncoder,
    Transcoder,
    TranscoderConfig,
    cross_layer_decode,
    dtype_name,
)


class TranscoderSet:
    """The transcoders of one model: a mapping from layer to transcoder, or one cross-layer one.

    Args:
        source: Where the weights come from.
        device: Where layers are put when they load (default: CPU).
        dtype: What they are cast to when they load (default: as stored).

    Attributes:
        cross_layer: Whether it is one cross-layer transcoder.
        joint_k: Features kept per position over all layers together; None where each layer's are
            chosen by themselves.

    Raises:
        ConfigError: The layers disagree on what must be one thing for the whole set.
    """

    def __init__(
        self,
        source: LayerSource,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not source.configs:
            raise ConfigError("a transcoder set needs at least one layer")
        kinds = {config.cross_layer for config in source.configs.values()}
        if len(kinds) > 1:
            raise ConfigError("a transcoder set is either per-layer or cross-layer, not both")
        joint = {config.joint_k for config in source.configs.values()}
        if len(joint) > 1:
            raise ConfigError(
                "the layers of a set whose features are chosen over all layers together must all "
                f"say so with one k, got {', '.join(sorted(map(str, joint)))}"
            )
        self.source = source
        self.device = torch.device(device or "cpu")
        self.dtype = dtype
        self.cross_layer: bool = kinds.pop()
        self.joint_k: int | None = joint.pop()
        self._kept: dict[int, Transcoder | CrossLayerPart] = {}

    @classmethod
    def from_transcoders(
        cls, modules: Mapping[int, Transcoder | CrossLayerPart] | CrossLayerTranscoder
    ) -> TranscoderSet:
        """A set of transcoders that are in memory: layer -> transcoder, or one cross-layer one."""
        if isinstance(modules, CrossLayerTranscoder):
            modules = {layer: modules.part(layer) for layer in modules.layers}
        return cls(MemorySource(modules))

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | Path,
        *,
        layers: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        format: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **format_options: Any,
    ) -> TranscoderSet:
        """Open a published set: a folder, a Hub id, or ``"builtin/..."``.

        Only configs and headers are read; weights load layer by layer when they are used.

        Args:
            repo_or_folder: Folder, Hub repository id, or the name of a set in this package.
            layers: Open (and download) these layers only.
            device: Where layers are put when they load.
            dtype: What they are cast to; by default they stay as stored.
            format: The format's name, where it cannot be told from the files.
            revision: Branch, tag or commit of the repository.
            cache_dir: The Hub cache to use.
            token: Hub token, or True for the stored one.
            local_files_only: Do not download.
            **format_options: What one format needs and does not store (``k=...``).

        Raises:
            CheckpointError: Nothing readable there, or a damaged file.
        """
        from .hub.registry import open_checkpoint

        source = open_checkpoint(
            repo_or_folder,
            layers=layers,
            format=format,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            **format_options,
        )
        return cls(source, device=device, dtype=dtype)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        metrics: Mapping[Any, Any] | None = None,
        license: str | None = None,
    ) -> Path:
        """Write the set in this package's own format, with a model card (see ``hub/native.py``)."""
        from .hub.native import save_set

        return save_set(self, folder, metrics=metrics, license=license)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Write and upload the set (see ``hub/publish.py``); returns the commit's address."""
        from .hub.publish import push_set

        return push_set(self, repo_id, **options)

    # -- what is in it ---------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers it has transcoders for, in order."""
        return tuple(sorted(self.source.configs))

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the weights came from: repository, revision, files, format, folds."""
        return dict(self.source.provenance)

    def config(self, layer: int) -> TranscoderConfig:
        """A layer's config, without loading its weights."""
        self._check(layer)
        return self.source.configs[layer]

    def _check(self, layer: int) -> None:
        if layer not in self.source.configs:
            raise InputError(f"this transcoder set has layers {list(self.layers)}, not {layer}")

    def __len__(self) -> int:
        return len(self.source.configs)

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __contains__(self, layer: object) -> bool:
        return layer in self.source.configs

    # -- weights ---------------------------------------------------------------------------------

    def __getitem__(self, layer: int) -> Transcoder | CrossLayerPart:
        """The layer's transcoder, loaded on first use and kept."""
        if layer not in self._kept:
            self._kept[layer] = self.load(layer)
        return self._kept[layer]

    def load(self, layer: int, *, dtype: torch.dtype | None = None) -> Transcoder | CrossLayerPart:
        """The layer's transcoder without keeping it in the set.

        Args:
            layer: Which layer.
            dtype: Overrides the set's dtype for this call.

        Raises:
            CheckpointError: A weight is NaN or infinite.
        """
        self._check(layer)
        # What was kept is in the set's dtype; from a coarser one there is no way back.
        if layer in self._kept and (self.dtype is None or dtype in (None, self.dtype)):
            module = self._kept[layer]
        else:
            module = self.source.load(layer)
            _check_finite(module, layer)
        wanted, here = dtype or self.dtype or module.W_enc.dtype, module.W_enc.device
        there = here.type == self.device.type and self.device.index in (None, here.index)
        fits = there and module.W_enc.dtype == wanted
        return module if fits else _converted(module, self.device, wanted)

    def rows(self, layer: int, indices: Tensor | Sequence[int], which: Rows = "decoder") -> Tensor:
        """Single encoder or decoder rows, read without loading the layer where the file allows.

        Args:
            layer: Which layer.
            indices: Feature indices ``(n,)``.
            which: ``"encoder"``: ``(n, d_in)``; ``"decoder"``: ``(n, d_out)``, or
                ``(n, n_targets, d_out)`` for a cross-layer set.
        """
        self._check(layer)
        indices = torch.as_tensor(indices, dtype=torch.long)
        width = self.config(layer).d_transcoder
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < width:
            raise InputError(
                f"layer {layer} has features 0 to {width - 1}; asked for "
                f"{int(indices.min())} to {int(indices.max())}"
            )
        if layer in self._kept:
            module = self._kept[layer]
            return (module.W_enc if which == "encoder" else module.W_dec).detach()[
                indices.to(self.device)
            ]
        rows = self.source.rows(layer, indices.cpu(), which)
        return rows.to(self.device, self.dtype or rows.dtype)

    def targets(self, layer: int) -> tuple[int, ...]:
        """The layers whose outputs ``layer``'s features write to: itself, or it and all later."""
        self._check(layer)
        if not self.cross_layer:
            return (layer,)
        return tuple(target for target in self.layers if target >= layer)

    @torch.no_grad()
    def encode(self, inputs: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Feature activations of some layers; no layer is kept that was not before.

        Args:
            inputs: Layer -> value at its input site ``(..., T, d_in)``, on any device.

        Returns:
            Layer -> ``(..., T, d_transcoder)``; zero at leading positions that the set leaves out.

        Raises:
            InputError: Some layers only of a set whose features are chosen over all layers.
        """
        if self.joint_k is not None and set(inputs) != set(self.layers):
            raise InputError(
                "this set chooses its features over all layers together: it needs the values of "
                f"layers {list(self.layers)}, got {sorted(inputs)}"
            )
        found, norms = {}, {}
        for layer, x in inputs.items():
            part = self.load(layer)
            found[layer] = part.encode(x.to(part.W_enc.device))
            found[layer][..., : self.config(layer).leading_positions, :] = 0
            if self.joint_k is not None:
                norms[layer] = part.decoder_norms()
        return found if self.joint_k is None else keep_joint(found, norms, self.joint_k)

    def decode(
        self, layer: int, activations: Mapping[int, Tensor], x: Tensor | None = None
    ) -> Tensor:
        """Layer ``layer``'s reconstruction from the activations of the layers that write to it."""
        own = self[layer]
        if isinstance(own, Transcoder):
            return own.decode(activations[layer], x)
        parts = [self[source] for source in self.layers if source <= layer]
        return cross_layer_decode(own, parts, activations, x)  # type: ignore[arg-type]

    def cross_layer_transcoder(self) -> CrossLayerTranscoder:
        """All layers as one ``CrossLayerTranscoder`` (loads everything)."""
        if not self.cross_layer:
            raise InputError("this is a per-layer set; it has no cross-layer transcoder")
        parts = {layer: self[layer] for layer in self.layers}
        return CrossLayerTranscoder(parts)  # type: ignore[arg-type]

    def subset(self, layers: Sequence[int]) -> TranscoderSet:
        """The same set restricted to some layers.

        Raises:
            InputError: A layer that is not there, or a set whose layers need each other: a
                cross-layer one, or one whose features are chosen over all layers together.
        """
        for layer in layers:
            self._check(layer)
        if self.cross_layer and set(layers) != set(self.layers):
            raise InputError(
                "a cross-layer set cannot be cut to some layers: each layer's output needs the "
                "features of all layers below it"
            )
        if self.joint_k is not None and set(layers) != set(self.layers):
            raise InputError(
                "a set whose features are chosen over all layers together cannot be cut to some "
                "layers: which of their features stay depends on the others"
            )
        return TranscoderSet(
            Subset(self.source, sorted(set(layers))), device=self.device, dtype=self.dtype
        )

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TranscoderSet:
        """The same set with another device or dtype for its layers (nothing is loaded yet)."""
        return TranscoderSet(self.source, device=device or self.device, dtype=dtype or self.dtype)

    def check_model(self, d_model: int, n_layers: int, name: str) -> None:
        """Check that the set can belong to a model of this shape.

        Raises:
            MismatchError: Naming both values.
        """
        for layer in self.layers:
            config = self.config(layer)
            for side, width in (("d_in", config.d_in), ("d_out", config.d_out)):
                if width != d_model:
                    raise MismatchError(
                        f"layer {layer}'s transcoder has {side}={width}, but {name} has "
                        f"d_model={d_model}: this set belongs to another model"
                        + (f" ({config.base_model})" if config.base_model else "")
                    )
        if self.layers[-1] >= n_layers:
            raise MismatchError(
                f"the set has layers up to {self.layers[-1]}, but {name} has {n_layers} layers "
                f"(0 to {n_layers - 1})"
            )

    def __repr__(self) -> str:
        first = self.config(self.layers[0])
        kind = "cross-layer" if self.cross_layer else ("skip" if first.skip else "per-layer")
        where = self.provenance.get("repository") or self.provenance.get("folder") or "memory"
        return (
            f"TranscoderSet({kind}, layers={_ranges(self.layers)}, d_model={first.d_in}, "
            f"d_transcoder={first.d_transcoder}, activation={first.activation}, "
            f"{first.input_site}->{first.output_site}, from {where})"
        )


def _check_finite(module: FeatureEncoder, layer: int) -> None:
    for name, weight in module.state_dict().items():
        # The sum is finite unless an entry is not (or it overflows): one quick pass tells.
        if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():
            raise CheckpointError(
                f"layer {layer}'s weight {name} holds NaN or infinite values: the checkpoint is "
                "damaged or was saved from a diverged run"
            )


def _converted(
    module: Transcoder | CrossLayerPart, device: torch.device, dtype: torch.dtype
) -> Transcoder | CrossLayerPart:
    """A converted copy: the source may hand out the user's own module, which stays as it is."""
    config = module.config.replace(dtype=dtype_name(dtype))
    threshold = getattr(module.activation, "threshold", None)
    if threshold is not None:
        threshold = threshold.detach().to(device, dtype)
    with torch.device("meta"):
        if isinstance(module, CrossLayerPart):
            copy: Transcoder | CrossLayerPart = CrossLayerPart(config, module.targets, threshold)
        else:
            copy = Transcoder(config, threshold)
    state = {
        name: weight.detach().to(device, dtype) for name, weight in module.state_dict().items()
    }
    copy.load_state_dict(state, assign=True)
    return copy.requires_grad_(module.W_enc.requires_grad)


def _ranges(layers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``"0-2,5"``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
