"""Transcoders: sparse, wide stand-ins for MLPs (torch only, no model, no Hub).

``Transcoder`` replaces one MLP (Dunefsky, Chlenski, Nanda 2024), with an affine skip path where it
has one (Paulo, Shabalin, Belrose 2025). ``CrossLayerTranscoder`` reads at one layer and writes to
that layer's and all later layers' MLP outputs (Ameisen et al. 2025).

Shapes: ``d_in``/``d_out`` the model's width at the input and output site, ``F`` = d_transcoder.
``W_enc (F, d_in)``, ``b_enc (F,)``, ``W_dec (F, d_out)``, ``b_dec (d_out,)``,
``W_skip (d_out, d_in)``: one row per feature in the encoder and in the decoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activations import check_activation, keep_joint, make_activation
from .errors import ConfigError, InputError
from .sparse_product import sparse_decode, use_sparse

#: Where a transcoder reads: the raw residual stream, the norm before its gain, the norm's output. A
#: sparse autoencoder reads what it reconstructs, one of the output sites.
InputSite = Literal["R", "N0", "N1", "O", "O'"]
#: Where its output goes: the MLP's output, or that after the norm which follows the MLP.
OutputSite = Literal["O", "O'"]


@dataclass(frozen=True)
class TranscoderConfig:
    """What a transcoder is, apart from its weights. Serialises to JSON with ``to_dict``.

    Attributes:
        d_in: Width at the input site.
        d_out: Width at the output site.
        d_transcoder: Number of features.
        layer: The layer whose MLP it reads.
        activation: One of ``activations.ACTIVATIONS``.
        k: Features kept per position (per group for ``grouptopk``, over all layers for
            ``jointtopk``).
        relu_first: Whether a ReLU comes before the choice of the top k.
        n_groups: Groups of ``grouptopk``.
        input_site: ``"R"``, ``"N0"`` or ``"N1"`` (docs/concepts.md, "Sites"); the same as
            ``output_site`` for a sparse autoencoder.
        output_site: ``"O"`` or ``"O'"``.
        skip: Whether there is an affine skip path ``x @ W_skip.T``.
        cross_layer: Whether the decoder writes to several layers.
        leading_positions: Leading positions (BOS and the like) that the set was not trained on;
            their features are left out.
        base_model: The Hub id of the model it belongs to, if known.
        dtype: The dtype of the stored weights, as a torch name.
        source_format: The format the weights came from.
        extra: Keys of a foreign config that have no field here, kept as they were.
    """

    d_in: int
    d_out: int
    d_transcoder: int
    layer: int = 0
    activation: str = "relu"
    k: int | None = None
    relu_first: bool = True
    n_groups: int | None = None
    input_site: InputSite = "N1"
    output_site: OutputSite = "O"
    skip: bool = False
    cross_layer: bool = False
    leading_positions: int = 0
    base_model: str | None = None
    dtype: str = "float32"
    source_format: str = "native"
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("d_in", "d_out", "d_transcoder"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if self.layer < 0 or self.leading_positions < 0:
            raise ConfigError(
                f"layer and leading_positions must not be negative, got {self.layer} and "
                f"{self.leading_positions}"
            )
        for name, options in (("input_site", InputSite), ("output_site", OutputSite)):
            if getattr(self, name) not in get_args(options):
                raise ConfigError(
                    f"{name} must be one of {', '.join(get_args(options))}, "
                    f"got {getattr(self, name)!r}"
                )
        if self.input_site in get_args(OutputSite) and not self.is_autoencoder:
            raise ConfigError(
                f"input_site {self.input_site!r} is an output site: only a sparse autoencoder "
                f"reads there, which then writes there too, not to {self.output_site!r}"
            )
        check_activation(self.activation, self.d_transcoder, self.k, self.n_groups)

    @property
    def is_autoencoder(self) -> bool:
        """Whether it reads what it reconstructs: a sparse autoencoder, not a transcoder."""
        return self.input_site == self.output_site

    @property
    def joint_k(self) -> int | None:
        """Features kept per position over all layers together; None where each layer's are chosen
        by themselves."""
        return self.k if self.activation == "jointtopk" else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary that ``from_dict`` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TranscoderConfig:
        """Read ``to_dict``'s output.

        Raises:
            ConfigError: An unknown key, or a value out of range.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ConfigError(
                f"unknown transcoder config key(s) {', '.join(unknown)}; "
                f"known: {', '.join(sorted(known))}"
            )
        try:
            return cls(**data)
        except TypeError as error:
            raise ConfigError(f"incomplete transcoder config: {error}") from error

    def replace(self, **changes: Any) -> TranscoderConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)


def dtype_name(dtype: Any) -> str:
    """``torch.bfloat16`` -> ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """``"bfloat16"`` -> ``torch.bfloat16``.

    Raises:
        ConfigError: If torch has no floating-point dtype of that name.
    """
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"{name!r} is not a floating-point torch dtype")
    return dtype


class FeatureEncoder(nn.Module):
    """The encoder half that every kind of transcoder shares: ``act(W_enc x + b_enc)``."""

    activation: nn.Module

    def __init__(self, config: TranscoderConfig, threshold: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        dtype = torch_dtype(config.dtype)
        self.W_enc = nn.Parameter(torch.zeros(config.d_transcoder, config.d_in, dtype=dtype))
        self.b_enc = nn.Parameter(torch.zeros(config.d_transcoder, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(config.d_out, dtype=dtype))
        skip = torch.zeros(config.d_out, config.d_in, dtype=dtype) if config.skip else None
        self.W_skip = None if skip is None else nn.Parameter(skip)
        self.activation = make_activation(
            config.activation,
            d_transcoder=config.d_transcoder,
            k=config.k,
            relu_first=config.relu_first,
            n_groups=config.n_groups,
            threshold=threshold,
        )
        if threshold is None:
            self.activation.to(dtype)

    def decoder_norms(self) -> Tensor:
        """Norm of all that each feature writes: ``(d_transcoder,)``, in float32."""
        W_dec = self.W_dec
        assert isinstance(W_dec, Tensor)
        return W_dec.detach().float().flatten(1).norm(dim=1)

    def pre_activations(self, x: Tensor) -> Tensor:
        """``W_enc x + b_enc``: ``(..., d_in) -> (..., d_transcoder)``, in the weights' dtype."""
        if x.shape[-1] != self.config.d_in:
            raise InputError(
                f"layer {self.config.layer}'s transcoder reads vectors of width "
                f"{self.config.d_in}, got {x.shape[-1]}"
            )
        return F.linear(x.to(self.W_enc.dtype), self.W_enc, self.b_enc)

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations of ``x``: ``(..., d_in) -> (..., d_transcoder)``."""
        return self.activation(self.pre_activations(x))

    def skip(self, x: Tensor | None) -> Tensor | float:
        """The skip path ``x W_skip.T``, or 0 where there is none."""
        if self.W_skip is None:
            return 0.0
        if x is None:
            raise InputError(
                f"layer {self.config.layer}'s transcoder has a skip path: decode needs x as well"
            )
        return F.linear(x.to(self.W_skip.dtype), self.W_skip)

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"layer={c.layer}, d_in={c.d_in}, d_out={c.d_out}, d_transcoder={c.d_transcoder}, "
            f"{c.activation}, {c.input_site}->{c.output_site}"
            f"{', skip' if c.skip else ''}, {str(self.W_enc.dtype).removeprefix('torch.')}"
        )


class Transcoder(FeatureEncoder):
    """A per-layer transcoder: ``y = act(W_enc x + b_enc) W_dec + b_dec (+ x W_skip.T)``."""

    def __init__(self, config: TranscoderConfig, threshold: Tensor | None = None) -> None:
        super().__init__(config, threshold)
        self.W_dec = nn.Parameter(
            torch.zeros(config.d_transcoder, config.d_out, dtype=self.W_enc.dtype)
        )

    def decode(
        self, activations: Tensor, x: Tensor | None = None, *, sparse: bool | None = None
    ) -> Tensor:
        """Activations ``(..., d_transcoder)`` -> reconstruction ``(..., d_out)``.

        Args:
            activations: Feature activations.
            x: The input-site value ``(..., d_in)``, needed by the skip path.
            sparse: Force the sparse or the dense product; by default the sparser one is chosen
                from the share of active features.
        """
        activations = activations.to(self.W_dec.dtype)
        if use_sparse(activations, sparse):
            out = sparse_decode(activations, self.W_dec)
        else:
            out = activations @ self.W_dec
        return out + self.b_dec + self.skip(x)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct the MLP's output from its input, in the dtype of ``x``."""
        return self.decode(self.encode(x), x).to(x.dtype)


class CrossLayerPart(FeatureEncoder):
    """One source layer of a cross-layer transcoder.

    ``W_dec (F, n_targets, d_out)``: row ``i``, column ``j`` is what feature ``i`` writes to the
    ``j``-th of ``targets`` (the source layer itself first). ``b_dec`` and ``W_skip`` belong to the
    part's own layer as a *written* layer.
    """

    def __init__(
        self, config: TranscoderConfig, targets: tuple[int, ...], threshold: Tensor | None = None
    ) -> None:
        super().__init__(config.replace(cross_layer=True), threshold)
        if not targets or targets[0] != config.layer or list(targets) != sorted(set(targets)):
            raise ConfigError(
                f"a cross-layer part of layer {config.layer} must write to that layer first and "
                f"to later ones in order, got {targets}"
            )
        self.targets = targets
        self.W_dec = nn.Parameter(
            torch.zeros(config.d_transcoder, len(targets), config.d_out, dtype=self.W_enc.dtype)
        )

    def contribution(
        self, activations: Tensor, target: int, *, sparse: bool | None = None
    ) -> Tensor:
        """What these activations add to layer ``target``'s output: ``(..., d_out)``, no bias."""
        if target not in self.targets:
            raise InputError(
                f"layer {self.config.layer}'s features write to layers {self.targets}, "
                f"not to {target}"
            )
        j = self.targets.index(target)
        activations = activations.to(self.W_dec.dtype)
        if use_sparse(activations, sparse):
            table = self.W_dec.reshape(-1, self.config.d_out)
            return sparse_decode(activations, table, stride=len(self.targets), offset=j)
        return activations @ self.W_dec[:, j]


def cross_layer_decode(
    own: CrossLayerPart,
    parts: Iterable[CrossLayerPart],
    activations: Mapping[int, Tensor],
    x: Tensor | None,
    *,
    sparse: bool | None = None,
) -> Tensor:
    """One layer's output ``(..., d_out)``: its bias and skip path, and what each part writes to it.

    Args:
        own: The part of the written layer.
        parts: The parts that write to it, ``own`` among them.
        activations: By layer, ``(..., d_transcoder)``.
        x: The input-site value of ``own``, needed by its skip path.
        sparse: See ``Transcoder.decode``.
    """
    out = own.b_dec + own.skip(x)
    for part in parts:
        layer = part.config.layer
        out = out + part.contribution(activations[layer], own.config.layer, sparse=sparse)
    return out


class CrossLayerTranscoder(nn.Module):
    """A cross-layer transcoder: ``y_l = sum_{s <= l} a_s W_dec[s -> l] + b_dec[l]``.

    Args:
        parts: One ``CrossLayerPart`` per layer.
    """

    def __init__(self, parts: Mapping[int, CrossLayerPart]) -> None:
        super().__init__()
        self.layers = tuple(sorted(parts))
        for layer in self.layers:
            late = tuple(target for target in self.layers if target >= layer)
            if parts[layer].targets != late:
                raise ConfigError(
                    f"layer {layer} of the cross-layer transcoder writes to "
                    f"{parts[layer].targets}, expected {late}"
                )
        self.parts = nn.ModuleDict({str(layer): parts[layer] for layer in self.layers})

    def part(self, layer: int) -> CrossLayerPart:
        """The part that reads at ``layer``."""
        if layer not in self.layers:
            raise InputError(f"this transcoder has layers {self.layers}, not {layer}")
        part = self.parts[str(layer)]
        assert isinstance(part, CrossLayerPart)
        return part

    def pre_activations(self, x: Tensor, layer: int) -> Tensor:
        """Pre-activations of ``layer``'s features from its input-site value ``(..., d_in)``."""
        return self.part(layer).pre_activations(x)

    def encode(self, x: Tensor, layer: int) -> Tensor:
        """Activations of ``layer``'s features from its input-site value ``(..., d_in)``."""
        return self.part(layer).encode(x)

    def decode(
        self,
        activations: Mapping[int, Tensor],
        layer: int,
        x: Tensor | None = None,
        *,
        sparse: bool | None = None,
    ) -> Tensor:
        """Layer ``layer``'s output ``(..., d_out)`` from the activations of all layers up to it."""
        parts = [self.part(source) for source in self.layers if source <= layer]
        return cross_layer_decode(self.part(layer), parts, activations, x, sparse=sparse)

    def forward(self, inputs: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Input-site values of all layers -> reconstructions of all layers."""
        activations = {layer: self.encode(inputs[layer], layer) for layer in self.layers}
        joint_k = self.part(self.layers[0]).config.joint_k
        if joint_k is not None:
            norms = {layer: self.part(layer).decoder_norms() for layer in self.layers}
            activations = keep_joint(activations, norms, joint_k)
        return {
            layer: self.decode(activations, layer, inputs[layer]).to(inputs[layer].dtype)
            for layer in self.layers
        }
