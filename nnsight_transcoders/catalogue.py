"""The published sets this package knows of, as a table in code: nothing is downloaded.

Read from the formats' own loading code and from model cards, not from the weights. ``unverified``
names what was not seen in either; None is what is not known. ``verify`` has the last word on
whether a set fits its model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CatalogueEntry:
    """One published set, or a family of them.

    Attributes:
        repository: Hub id; with a ``*`` where it stands for several.
        base_model: Hub id of the model.
        layers: How many of its layers have a transcoder.
        width: Features per layer.
        kind: ``"per-layer"``, ``"skip"`` (per layer, with a skip path) or ``"cross-layer"``.
        activation: As in ``TranscoderConfig``, with k.
        sites: Where it reads and writes, such as ``"N1 -> O"``.
        format: The ``format=`` that reads it.
        licence: Of the weights.
        remark: What one should know before loading it.
        unverified: The fields that no source states.
    """

    repository: str
    base_model: str | None
    layers: int | None
    width: int | None
    kind: str
    activation: str | None
    sites: str | None
    format: str
    licence: str | None = None
    remark: str = ""
    unverified: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def catalogue(base_model: str | None = None) -> tuple[CatalogueEntry, ...]:
    """All entries, in the order of base models.

    Args:
        base_model: Only those whose model's or repository's name contains this.
    """
    from .published import published

    entries = published()
    if base_model is None:
        return entries
    wanted = base_model.lower()
    return tuple(e for e in entries if wanted in f"{e.base_model or ''} {e.repository}".lower())
