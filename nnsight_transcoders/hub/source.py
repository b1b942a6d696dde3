"""A ``LayerSource`` over safetensors files, from a plan that says which tensor is where.

A format only has to write the plan: the layer's config and, for each tensor of the canonical form
(``W_enc``, ``b_enc``, ``W_dec``, ``b_dec``, ``W_skip``, ``threshold``), its file, its name there
and whether it is stored transposed. Checks, loading and reading of rows are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub.snapshot import Snapshot
from nnsight_transcoders.hub.tensors import FLOAT_DTYPES, TensorInfo, open_tensors, read_rows
from nnsight_transcoders.layer_sources import Rows
from nnsight_transcoders.transcoder import CrossLayerPart, Transcoder, TranscoderConfig, dtype_name


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor is: file, name in it, and whether it is stored the other way round.

    Attributes:
        file: The file.
        key: The tensor's name in it.
        transposed: It is a matrix stored the other way round.
        zeros: For a cross-layer ``W_dec``: so many targets come before the first one of the plan,
            and what is written to them must be zero.
    """

    file: str
    key: str
    transposed: bool = False
    zeros: int = 0


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is put together.

    Attributes:
        config: The layer's config.
        tensors: Canonical name -> where it is.
        targets: The layers it writes to, for a part of a cross-layer transcoder.
        ignored: Names in its files that are known and carry no weights (``"k"``).
        fold: Called with the loaded tensors, canonical but for what it changes in place: ``b_enc``
            or ``b_dec``. ``W_enc`` and ``W_dec`` stay, since ``rows`` reads them from the file.
    """

    config: TranscoderConfig
    tensors: Mapping[str, TensorRef]
    targets: tuple[int, ...] | None = None
    ignored: Collection[str] = ()
    fold: Callable[[dict[str, Tensor]], None] | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The files it needs, each once."""
        return tuple(dict.fromkeys(ref.file for ref in self.tensors.values()))


class TensorSource:
    """A ``LayerSource`` that reads safetensors files of a snapshot when they are used."""

    def __init__(
        self, snapshot: Snapshot, plans: Mapping[int, LayerPlan], provenance: Mapping[str, Any]
    ) -> None:
        self._snapshot, self._plans = snapshot, dict(sorted(plans.items()))
        self.configs = {layer: plan.config for layer, plan in self._plans.items()}
        files = sorted({file for plan in self._plans.values() for file in plan.files})
        self.provenance = {**snapshot.provenance(), "files": files, "folds": [], **provenance}

    def load(self, layer: int) -> Transcoder | CrossLayerPart:
        """The layer's module; its weights are checked against the config on the way."""
        plan = self._plans[layer]
        tensors: dict[str, Tensor] = {}
        for file in plan.files:
            path = self._snapshot.path(file)
            with open_tensors(path) as handle:
                header = {key: _info(handle, key) for key in handle.keys()}  # noqa: SIM118
                check_header(str(path), file, header, plan)
                for name, ref in plan.tensors.items():
                    if ref.file == file:
                        tensors[name] = _canonical(handle.get_tensor(ref.key), ref, str(path))
        if plan.fold is not None:
            plan.fold(tensors)
        return build_module(plan.config, tensors, plan.targets)

    def rows(self, layer: int, indices: Tensor, which: Rows) -> Tensor:
        """Single rows, read from the file without loading the tensor, in the layer's dtype."""
        plan = self._plans[layer]
        name = "W_enc" if which == "encoder" else "W_dec"
        ref = plan.tensors[name]
        path, info = self._checked(plan, name)
        rows = read_rows(path, ref.key, indices, transposed=ref.transposed)
        rows = rows[:, ref.zeros :].contiguous() if ref.zeros else rows
        encoder = info if name == "W_enc" else self._checked(plan, "W_enc")[1]
        return rows.to(FLOAT_DTYPES[encoder.dtype])

    def _checked(self, plan: LayerPlan, name: str) -> tuple[Path, TensorInfo]:
        """The file of a tensor and what its header says, which must be as planned."""
        ref = plan.tensors[name]
        path = self._snapshot.path(ref.file)
        with open_tensors(path) as handle:
            if ref.key not in set(handle.keys()):
                raise _missing(str(path), ref.key, handle.keys())
            info = _info(handle, ref.key)
        _check_tensor(str(path), name, ref, info, plan)
        return path, info


def expected_shape(
    name: str, config: TranscoderConfig, targets: tuple[int, ...] | None
) -> tuple[int, ...]:
    """The shape of a tensor in the canonical form."""
    d_in, d_out, width = config.d_in, config.d_out, config.d_transcoder
    return {
        "W_enc": (width, d_in),
        "b_enc": (width,),
        "W_dec": (width, d_out) if targets is None else (width, len(targets), d_out),
        "b_dec": (d_out,),
        "W_skip": (d_out, d_in),
        "threshold": (width,),
    }[name]


def build_module(
    config: TranscoderConfig, tensors: Mapping[str, Tensor], targets: tuple[int, ...] | None = None
) -> Transcoder | CrossLayerPart:
    """A module around tensors in the canonical form, without copying them.

    The dtype is that of ``W_enc``, whatever the config says; the other weights follow it, and a
    threshold keeps its own (it is only compared with).
    """
    dtype = tensors["W_enc"].dtype
    config = config.replace(dtype=dtype_name(dtype))
    threshold = tensors.get("threshold")
    with torch.device("meta"):
        if targets is None:
            module: Transcoder | CrossLayerPart = Transcoder(config, threshold)
        else:
            module = CrossLayerPart(config, targets, threshold)
    state = {name: tensor.to(dtype) for name, tensor in tensors.items() if name != "threshold"}
    if threshold is not None:
        state["activation.threshold"] = threshold
    module.load_state_dict(state, assign=True)
    return module


def _info(handle: Any, key: str) -> TensorInfo:
    stored = handle.get_slice(key)
    return TensorInfo(tuple(stored.get_shape()), stored.get_dtype())


def _canonical(tensor: Tensor, ref: TensorRef, path: str) -> Tensor:
    """A stored tensor the way round that the canonical form has it."""
    if ref.zeros:
        if torch.count_nonzero(tensor[:, : ref.zeros]):
            raise CheckpointError(
                f"{path}: {ref.key} writes to layers before its own (slices 0 to {ref.zeros - 1} "
                "are not zero), so it is not what its layout says"
            )
        return tensor[:, ref.zeros :].contiguous()
    return tensor.T.contiguous() if ref.transposed else tensor


def _missing(path: str, key: str, present: Collection[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} has no tensor {key}; it has {', '.join(sorted(present)) or 'none'}"
    )


def check_header(where: str, file: str, header: Mapping[str, TensorInfo], plan: LayerPlan) -> None:
    """Check one file's header against a layer's plan.

    Args:
        where: What to call the file in messages.
        file: Its name in the plan.
        header: Its tensors.
        plan: What the layer expects.

    Raises:
        CheckpointError: A tensor too few or too many (the file is not what the config says), or
            one of another shape or dtype.
    """
    refs = {name: ref for name, ref in plan.tensors.items() if ref.file == file}
    wanted = {ref.key for ref in refs.values()}
    for key in sorted(wanted - set(header)):
        raise _missing(where, key, header)
    unexpected = sorted(set(header) - wanted - set(plan.ignored))
    if unexpected:
        raise CheckpointError(
            f"{where} has tensor(s) {', '.join(unexpected)} that the config does not account for "
            f"(expected {', '.join(sorted(wanted))}); reading it without them could give wrong "
            "results"
        )
    for name, ref in refs.items():
        _check_tensor(where, name, ref, header[ref.key], plan)


def _check_tensor(path: str, name: str, ref: TensorRef, info: TensorInfo, plan: LayerPlan) -> None:
    expected = expected_shape(name, plan.config, plan.targets)
    if ref.transposed:
        expected = expected[::-1]
    if ref.zeros:
        expected = (expected[0], expected[1] + ref.zeros, *expected[2:])
    # One threshold may stand for all features.
    allowed = (expected, ()) if name == "threshold" else (expected,)
    if info.shape not in allowed:
        raise CheckpointError(
            f"{path}: tensor {ref.key} has shape {info.shape}, expected {expected} "
            f"(layer {plan.config.layer}: d_in={plan.config.d_in}, d_out={plan.config.d_out}, "
            f"d_transcoder={plan.config.d_transcoder})"
        )
    if info.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{path}: tensor {ref.key} has dtype {info.torch_name}, expected one of "
            f"{', '.join(FLOAT_DTYPES)}"
        )
