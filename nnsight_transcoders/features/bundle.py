"""``FeatureBundle``: what features respond to, read from its files feature by feature.

Opening reads ``bundle.json``, the labels and the header of the tables; a feature's rows are read
from the mapped file when they are asked for, so a bundle of hundreds of thousands of features opens
at once and takes no memory. Needs torch and safetensors, no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nnsight_transcoders._files import atomic_path
from nnsight_transcoders.errors import InputError

from .bundle_files import LABELS, TABLES, read_index
from .labels import FeatureLabels
from .lazy_tables import LazyTables
from .reading import FeatureReader
from .report import Example, FeatureReport

if TYPE_CHECKING:
    from nnsight_transcoders.circuits.graph import AttributionGraph


class FeatureBundle:
    """A bundle of feature statistics; ``bundle[layer, feature]`` is a ``FeatureReport``.

    Open one with ``FeatureBundle.open`` or make one with ``collect_features``.

    Attributes:
        folder: Where it is.
        metadata: ``bundle.json``: model, transcoders, settings, sizes.
        labels: What features are said to mean; ``labels.save()`` writes them into the folder.
    """

    def __init__(self, folder: Path, metadata: dict[str, Any], tables: LazyTables) -> None:
        self.folder, self.metadata, self._tables = folder, metadata, tables
        self._widths = {int(layer): int(n) for layer, n in metadata["layers"].items()}
        self._first: dict[int, int] = {}
        total = 0
        for layer, width in self._widths.items():
            self._first[layer] = total
            total += width
        self._reader = FeatureReader(tables, metadata, self._first)
        self.labels = FeatureLabels.read(folder / LABELS, missing_ok=True)

    @classmethod
    def open(cls, path: str | Path) -> FeatureBundle:
        """Open a bundle's folder.

        Raises:
            CheckpointError: It is no bundle, or a damaged one.
        """
        folder = Path(path)
        metadata = read_index(folder)
        total = sum(int(width) for width in metadata["layers"].values())
        return cls(folder, metadata, LazyTables(folder / TABLES, total))

    # -- what is in it ---------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers it has features of."""
        return tuple(self._widths)

    def n_features(self, layer: int) -> int:
        """Number of features of a layer.

        Raises:
            InputError: It has no such layer.
        """
        if layer not in self._widths:
            known = ", ".join(map(str, self.layers))
            raise InputError(f"this bundle has layers {known}, not {layer}")
        return self._widths[layer]

    def __len__(self) -> int:
        return sum(self._widths.values())

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, tuple) or len(key) != 2:
            return False
        layer, index = key
        return layer in self._widths and 0 <= index < self._widths[layer]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((layer, i) for layer, width in self._widths.items() for i in range(width))

    def __repr__(self) -> str:
        return (
            f"FeatureBundle({len(self)} features of {len(self.layers)} layers on "
            f"{self.metadata['n_tokens']} tokens, {len(self.labels)} labels, {self.folder})"
        )

    def density(self, layer: int) -> Tensor:
        """Share of the measured positions where each feature of a layer is active: ``(F,)``."""
        return self._column("count", layer).float() / max(1, self.metadata["n_positions"])

    def max_activation(self, layer: int) -> Tensor:
        """Largest activation of each feature of a layer: ``(F,)``."""
        return self._column("maximum", layer)

    def _column(self, name: str, layer: int) -> Tensor:
        width = self.n_features(layer)
        return self._tables.rows(name, self._first[layer], self._first[layer] + width)

    # -- one feature -----------------------------------------------------------------------------

    def __getitem__(self, key: tuple[int, int]) -> FeatureReport:
        """What is known about feature ``key = (layer, index)``.

        Raises:
            InputError: No such layer or feature.
            CheckpointError: The bundle is damaged.
        """
        return self._reader.report(key, self._row(*key), self.labels.get(key))

    def inactive_examples(self, layer: int, index: int, n: int = 10) -> tuple[Example, ...]:
        """Windows drawn at random from the whole text in which a feature is not active."""
        return self._reader.inactive(self._row(layer, index), n)

    def _row(self, layer: int, index: int) -> int:
        width = self.n_features(layer)
        if not 0 <= index < width:
            raise InputError(f"layer {layer} has features 0 to {width - 1}, got {index}")
        return self._first[layer] + index

    # -- showing ---------------------------------------------------------------------------------

    def details(self, graph: AttributionGraph, n_examples: int = 8) -> dict[str, dict[str, Any]]:
        """What is known about a graph's features, for ``graph.to_html(feature_details=...)``.

        Args:
            graph: Usually a pruned graph; features of other layers are left out.
            n_examples: Examples of each.
        """
        features = graph.of_kind("feature")
        keys = set(zip(graph.layer[features].tolist(), graph.index[features].tolist(), strict=True))
        found = {}
        for key in sorted(keys):
            if key in self:
                data = self[key].to_dict()
                top = data.pop("groups")[:1]
                data["examples"] = top[0]["examples"][:n_examples] if top else []
                found[f"{key[0]}_{key[1]}"] = data
        return found

    def to_html(
        self,
        path: str | Path | None = None,
        features: Iterable[tuple[int, int]] | None = None,
        *,
        title: str | None = None,
        most: int = 200,
    ) -> str:
        """Dashboards as one self-contained page; written to ``path`` if given, and returned.

        Args:
            path: Where to write it.
            features: Which ``(layer, index)`` (default: those that are active, most often active
                first, as many as ``most``).
            title: Heading.
            most: Most features on a page by default; each takes some 20 kB.

        Raises:
            InputError: A feature that is not in the bundle, or a file that cannot be written.
        """
        from nnsight_transcoders.viewer.dashboard import render_features

        chosen = self._most_active(most) if features is None else list(features)
        heading = title or f"Features of {self.metadata['model']}"
        page = render_features([self[key].to_dict() for key in chosen], title=heading)
        if path is not None:
            with atomic_path(Path(path)) as partial:
                partial.write_text(page, encoding="utf-8", errors="replace")
        return page

    def _repr_html_(self) -> str:
        from nnsight_transcoders.viewer.page import frame

        return frame(self.to_html(most=50), "Features", 700)

    def _most_active(self, most: int) -> Sequence[tuple[int, int]]:
        counts = torch.cat([self._column("count", layer) for layer in self.layers])
        order = counts.argsort(descending=True, stable=True)[:most]
        keys = [(layer, i) for layer in self.layers for i in range(self._widths[layer])]
        return [keys[i] for i in order.tolist() if counts[i] > 0]
