"""Gemma Scope 2 transcoders (Google DeepMind), per layer and cross-layer.

Per layer: ``transcoder_all/layer_{L}_width_{16k}_l0_{small}[_affine]/params.safetensors`` (and
``transcoder/`` at four depths), with ``w_enc (d, F)``, ``w_dec (F, d)``, ``b_enc``, ``b_dec``,
``threshold`` and perhaps ``affine_skip_connection (d_in, d_out)``, applied as ``x @ A``; beside it
perhaps a ``config.json``. Cross-layer: ``clt/width_{262k}_l0_{big}[_affine]/params_layer_{i}
.safetensors``, whose ``w_dec (F, N, d)`` is indexed by the layer written to; a layer that writes to
earlier ones is refused. JumpReLU, from the norm after its gain to after the norm that follows the
MLP. The same repositories hold autoencoders, in folders of other names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nnsight_transcoders.errors import CheckpointError
from nnsight_transcoders.hub import hooks
from nnsight_transcoders.hub.formats import (
    Evidence,
    Format,
    Strength,
    check_whole,
    choose_layers,
)
from nnsight_transcoders.hub.gemma_scope import width_number
from nnsight_transcoders.hub.snapshot import Snapshot
from nnsight_transcoders.hub.source import LayerPlan, TensorRef, TensorSource, check_header
from nnsight_transcoders.hub.tensors import TensorInfo
from nnsight_transcoders.transcoder import TranscoderConfig

NAME = "gemma-scope-2"

_SPARSITIES = ("small", "medium", "big")
_PER_LAYER = re.compile(
    r"^(?P<folder>(?:.*/)?(?:transcoder_all|transcoder)/|)layer_(?P<layer>\d{1,4})_"
    r"width_(?P<width>[^_/]+)_l0_(?P<l0>[^_/]+)(?P<affine>_affine)?/params\.safetensors$"
)
_CLT = re.compile(
    r"^(?P<folder>(?:.*/)?clt/|)(?:width_(?P<width>[^_/]+)_l0_(?P<l0>[^_/]+)"
    r"(?P<affine>_affine)?/)?params_layer_(?P<layer>\d{1,4})\.safetensors$"
)
_SET_NAME = re.compile(r"gemma-scope-2-(270m|\d+b)-(pt|it)\b")
_SKIP = "affine_skip_connection"
_LOG = logging.getLogger(__name__)


class Choice(NamedTuple):
    """One of the sets in a repository.

    Attributes:
        folder: ``"transcoder_all"``, ``"transcoder"`` or ``"clt"``; empty inside of it.
        width: ``"16k"``; empty inside of a cross-layer set's folder.
        l0: ``"small"``, ``"medium"`` or ``"big"``.
        affine: Whether it has a skip path.
        cross_layer: Whether it is a cross-layer set.
    """

    folder: str
    width: str
    l0: str
    affine: bool
    cross_layer: bool

    def __str__(self) -> str:
        name = f"width_{self.width}_l0_{self.l0}" if self.width else "params_layer_*"
        return f"{self.folder or '.'}: {name}{'_affine' if self.affine else ''}"

    @property
    def rank(self) -> tuple[Any, ...]:
        """The first by this order is the default."""
        folders = ("transcoder_all", "transcoder", "clt")
        last = self.folder.split("/")[-1]
        return (
            folders.index(last) if last in folders else -1,
            self.affine,
            width_number(self.width),
            _SPARSITIES.index(self.l0) if self.l0 in _SPARSITIES else len(_SPARSITIES),
            self,
        )


def _detect(snapshot: Snapshot) -> Evidence | None:
    found = [name for files in _sets(snapshot).values() for name in files.values()]
    return Evidence(Strength.FILE_NAMES, found[0]) if found else None


def _sets(snapshot: Snapshot) -> dict[Choice, dict[int, str]]:
    """Every set in the repository: layer -> file."""
    found: dict[Choice, dict[int, str]] = {}
    for name in snapshot.files:
        for pattern, cross_layer in ((_PER_LAYER, False), (_CLT, True)):
            if match := pattern.match(name):
                choice = Choice(
                    match["folder"].rstrip("/"),
                    match["width"] or "",
                    match["l0"] or "",
                    match["affine"] is not None,
                    cross_layer,
                )
                found.setdefault(choice, {})[int(match["layer"])] = name
    return found


def open_gemma_scope_2(
    snapshot: Snapshot, layers: Sequence[int] | None = None, **options: Any
) -> TensorSource:
    """Open Gemma Scope 2 transcoders; configs and headers are read.

    Raises:
        CheckpointError: No such set in the repository, or a file that is not as it should be.
    """
    choice, files = _choose(snapshot, options)
    chosen = choose_layers(files, layers, snapshot.where)
    if choice.cross_layer:
        check_whole(files, chosen, snapshot.where)
        if chosen != tuple(range(len(chosen))):
            raise CheckpointError(
                f"{snapshot.where} ({choice}) has layers {list(chosen)}; a cross-layer transcoder "
                "needs all of them from 0 on"
            )
    headers = snapshot.headers([files[layer] for layer in chosen])
    raw = {layer: _config(snapshot, files[layer]) for layer in chosen}
    plans, assumed = {}, []
    for layer in chosen:
        fields, guessed = _fields(snapshot, files[layer], raw[layer], options)
        plans[layer] = _plan(
            layer, files[layer], headers[files[layer]], snapshot, choice, len(files), fields
        )
        assumed += guessed
    _LOG.info("%s: %s", snapshot.where, choice)
    provenance = {
        "format": NAME,
        "config": {str(layer): raw[layer] for layer in chosen},
        "variant": str(choice),
        "assumed": sorted(set(assumed)),
    }
    return TensorSource(snapshot, plans, provenance)


def _choose(snapshot: Snapshot, options: Mapping[str, Any]) -> tuple[Choice, dict[int, str]]:
    """The set that the options name, the first by ``rank`` where they leave it open."""
    sets = _sets(snapshot)
    wanted = {
        name: options[name] for name in ("folder", "width", "l0", "affine") if name in options
    }
    fits = [choice for choice in sets if _fits(choice, wanted)]
    if not fits:
        asked = ", ".join(f"{name}={value!r}" for name, value in wanted.items())
        raise CheckpointError(
            f"{snapshot.where} has no Gemma Scope 2 transcoders{' with ' + asked if asked else ''}"
            f"; it has {'; '.join(map(str, sorted(sets))) or snapshot.listing()}"
        )
    # A set that has more of the layers comes before one that has few.
    best = min(fits, key=lambda choice: (choice.rank[0], -len(sets[choice]), choice.rank))
    return best, sets[best]


def _fits(choice: Choice, wanted: Mapping[str, Any]) -> bool:
    said = {
        "folder": {choice.folder, choice.folder.split("/")[-1]},
        "width": {choice.width},
        "l0": {choice.l0},
        "affine": {choice.affine},
    }
    for name, value in wanted.items():
        text = value.strip("/").removeprefix("width_") if isinstance(value, str) else value
        if not isinstance(text, str | bool) or text not in said[name]:
            return False
    return True


def _config(snapshot: Snapshot, file: str) -> dict[str, Any]:
    """The ``config.json`` beside a file; it may be absent."""
    name = f"{file.rpartition('/')[0]}/config.json".lstrip("/")
    return snapshot.json(name) if name in snapshot.files else {}


def _fields(
    snapshot: Snapshot, file: str, raw: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Sites, model and leading positions of a layer, and what was assumed for want of a config."""
    where = f"config.json beside {file} of {snapshot.where}"
    reads, writes = raw.get("hf_hook_point_in"), raw.get("hf_hook_point_out")
    kind = str(raw.get("type") or "transcoder")
    if "sae" in kind.lower() or (reads is not None and reads == writes):
        raise CheckpointError(f"{where}: it is an autoencoder, not a transcoder")
    architecture = str(raw.get("architecture") or "jumprelu").lower().replace("_", "")
    if architecture != "jumprelu":
        raise CheckpointError(f"{where} names the architecture {architecture!r}; known: jump_relu")
    assumed = []
    model = options.get("base_model") or raw.get("model_name")
    if model is None and (named := _SET_NAME.search(_whence(snapshot))):
        plain = named[1] == "270m" and named[2] == "pt"
        model = f"google/gemma-3-{named[1]}{'' if plain else '-' + named[2]}"
        assumed.append(f"base model {model}, from the name")
    leading = options.get("leading_positions")
    if leading is None:
        leading = 4 if str(model or "").endswith("-it") else 1
    return {
        "input_site": options.get("input_site")
        or ("N1" if reads is None else hooks.input_site(reads, where)),
        "output_site": options.get("output_site")
        or ("O'" if writes is None else hooks.output_site(writes, where)),
        "leading_positions": leading,
        "base_model": None if model is None else str(model),
    }, assumed


def _whence(snapshot: Snapshot) -> str:
    found = snapshot.provenance()
    return str(found.get("repository") or found.get("folder") or "")


def _plan(
    layer: int,
    file: str,
    header: Mapping[str, TensorInfo],
    snapshot: Snapshot,
    choice: Choice,
    n_layers: int,
    fields: Mapping[str, Any],
) -> LayerPlan:
    where = f"{file} of {snapshot.where}"
    shapes = _shapes(header, choice, where)
    refs = {
        "W_enc": TensorRef(file, "w_enc", transposed=True),
        "W_dec": TensorRef(file, "w_dec", zeros=layer if choice.cross_layer else 0),
        **{name: TensorRef(file, name) for name in ("b_enc", "b_dec", "threshold")},
    }
    refs |= {"W_skip": TensorRef(file, _SKIP, transposed=True)} if _SKIP in shapes else {}
    d_in, width = shapes["w_enc"]
    config = TranscoderConfig(
        d_in=d_in,
        d_out=shapes["w_dec"][-1],
        d_transcoder=width,
        layer=layer,
        activation="jumprelu",
        skip="W_skip" in refs,
        cross_layer=choice.cross_layer,
        dtype=header["w_enc"].torch_name,
        source_format=NAME,
        **fields,
    )
    targets = tuple(range(layer, n_layers)) if choice.cross_layer else None
    plan = LayerPlan(config, refs, targets)
    check_header(where, file, header, plan)
    return plan


def _shapes(
    header: Mapping[str, TensorInfo], choice: Choice, where: str
) -> dict[str, tuple[int, ...]]:
    """The tensors' shapes, once the matrices have as many dimensions as the kind of set needs."""
    shapes = {name: info.shape for name, info in sorted(header.items())}
    rank = 3 if choice.cross_layer else 2
    if len(shapes.get("w_enc", ())) != 2 or len(shapes.get("w_dec", ())) != rank:
        raise CheckpointError(
            f"{where} has {', '.join(f'{name} {s}' for name, s in shapes.items()) or 'nothing'}; "
            f"expected w_enc (d, F) and w_dec {'(F, layers, d)' if rank == 3 else '(F, d)'}"
        )
    if choice.width and choice.affine != (_SKIP in shapes):
        raise CheckpointError(
            f"{where} has {'no' if choice.affine else 'an'} {_SKIP}, against the folder's name"
        )
    return shapes


FORMATS = (
    Format(
        name=NAME,
        summary="layer_{i}_width_{w}_l0_{s}/params.safetensors; clt/…/params_layer_{i}.safetensors",
        detect=_detect,
        open=open_gemma_scope_2,
        options={
            "folder": "'transcoder_all' (default), 'transcoder' or 'clt'",
            "width": "'16k', '262k', …: the smallest by default",
            "l0": "'small' (default), 'medium' or 'big'",
            "affine": "whether to take the set with a skip path (default: without)",
            "input_site": "where it reads, over config.json (default N1)",
            "output_site": "where it writes, over config.json (default O')",
            "leading_positions": "positions left out (default: 4 for -it models, else 1)",
            "base_model": "the model's Hub id, where config.json does not name it",
        },
    ),
)
