"""Running statistics of features over a stream of activations (torch only).

Fed with batches of contexts and the active features in them, keeps in memory of a fixed size per
feature: how often and how strongly it is active, a histogram, the contexts with its largest
activation, samples of contexts in bands of activation, and a sketch of the positions where it is
active (from which ``coactive.py`` finds the features that are active with it). One pass, any order:
except for the rounding of sums, the result depends neither on the order of contexts nor on how they
are cut into batches.

*Histogram and bands.* The maximum of a feature is known only at the end, so its range is always
``[0, 2^e)`` with the smallest e that holds what was seen: when it grows, pairs of bins (bands)
become one, and nothing has to be seen again.

*Examples.* A context counts once, with its largest activation of the feature; the activations
around that peak are kept as shares of the peak in float16. Of the top examples whose windows hold
the same tokens only the strongest is kept. Bands hold a uniform random sample of the contexts in
them.

An active feature is one with an activation above zero; negative activations, which TopK without
ReLU can give, are left out.

Legend: F features, B contexts, T positions, n active entries, K top examples, W window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnsight_transcoders.errors import InputError

from .entries import SparseActivations, checked, peaks_of
from .reference import ReferenceWindows
from .tables import BestTable, mixed
from .windows import window_digests

#: Exponent of a feature that was never active.
NEVER = -(2**31)

#: The sums of a feature, by name, and the tables beside them.
SUMS = ("count", "total", "maximum", "exponent", "histogram")
TABLES = ("top", "bands", "sketch", "reference")

#: Corpora are addressed with 32 bits.
_LIMIT = 2**32 - 1

#: Features whose bands are regrouped at a time.
_CHUNK = 8192


@dataclass(frozen=True)
class StatisticsConfig:
    """What is kept of each feature.

    Attributes:
        n_top: Examples with the largest activations.
        n_bands: Bands of activation, a power of two; after the pass between half of them and all
            lie below the feature's maximum.
        per_band: Examples per band.
        n_bins: Bins of the histogram, a power of two.
        before: Tokens kept before the peak of an example.
        after: Tokens kept after it.
        sketch: Positions in the sketch for co-active features.
        n_reference: Windows drawn from the whole corpus, of which it is known which features are
            active in them; those that are not serve as examples of the opposite.
    """

    n_top: int = 12
    n_bands: int = 8
    per_band: int = 3
    n_bins: int = 64
    before: int = 23
    after: int = 8
    sketch: int = 64
    n_reference: int = 64

    def __post_init__(self) -> None:
        for name, least in {"n_top": 1, "per_band": 1, "before": 0, "after": 0}.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("sketch", "n_reference"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("n_bands", "n_bins"):
            value = getattr(self, name)
            if value < 2 or value & (value - 1):
                raise InputError(f"{name} must be a power of two from 2, got {value}")

    @property
    def window(self) -> int:
        """W: tokens kept of an example."""
        return self.before + 1 + self.after


class FeatureStatistics:
    """The statistics of F features so far.

    Args:
        n_features: F, all layers counted through.
        config: What is kept.

    Attributes:
        n_tokens: Tokens seen; also the number of the next one in the corpus.
        n_positions: Positions that were measured.
        count: ``(F,)`` int64 positions where each is active.
        total: ``(F,)`` float64 sum of its activations.
        maximum: ``(F,)`` float32.
        exponent: ``(F,)`` int32: activations are below ``2^exponent``; ``NEVER`` without any.
        histogram: ``(F, n_bins)`` int64 over ``[0, 2^exponent)``, bins of equal width.
        top: One row per feature; the key has the activation (float32 bits) above the place of the
            peak in the corpus, so that the earlier of two equal ones wins. Windows differ.
        bands: ``n_bands`` rows per feature; the key is a hash.
        sketch: One row per feature; the key is a hash of the position in the corpus, the same for
            all features.
        reference: Windows drawn from the whole corpus, and what is active in them.
    """

    def __init__(self, n_features: int, config: StatisticsConfig | None = None) -> None:
        config = config or StatisticsConfig()
        self.n_features, self.config = n_features, config
        self.n_tokens = self.n_positions = 0
        self.count = torch.zeros(n_features, dtype=torch.int64)
        self.total = torch.zeros(n_features, dtype=torch.float64)
        self.maximum = torch.zeros(n_features, dtype=torch.float32)
        self.exponent = torch.full((n_features,), NEVER, dtype=torch.int32)
        self.histogram = torch.zeros(n_features, config.n_bins, dtype=torch.int64)
        window = {"window": (torch.float16, (config.window,))}
        place = {"peak": (torch.int64, ()), "value": (torch.float32, ())}
        digest = {"digest": (torch.int64, ())}
        self.top = BestTable(n_features, config.n_top, {**window, **digest}, distinct="digest")
        self.bands = BestTable(n_features * config.n_bands, config.per_band, {**window, **place})
        self.sketch = BestTable(n_features, config.sketch, {})
        self.reference = ReferenceWindows(n_features, config.n_reference, config.window)

    def add(
        self, contexts: Sequence[Tensor], active: SparseActivations, n_positions: int | None = None
    ) -> None:
        """Add a batch of contexts, which follow those before in the corpus.

        Args:
            contexts: The token ids ``(T,)`` of each.
            active: What is active in them, in any order.
            n_positions: How many of their positions were measured (default: all).

        Raises:
            InputError: An activation is NaN or infinite, or the corpus is longer than 2^32 tokens.
        """
        active = checked(active)
        lengths = torch.tensor([len(context) for context in contexts])
        starts = self.n_tokens + lengths.cumsum(0) - lengths
        n_tokens = int(lengths.sum())
        if self.n_tokens + n_tokens > _LIMIT:
            raise InputError(f"a corpus can have {_LIMIT} tokens at most: use several bundles")
        self._add_sums(active)
        place = starts[active.context] + active.position
        self.sketch.offer(active.feature, mixed(place), {})
        self._add_examples(contexts, active, place)
        self.reference.add(lengths, starts, active, place)
        self.n_tokens += n_tokens
        self.n_positions += n_tokens if n_positions is None else n_positions

    # -- sums and histogram ----------------------------------------------------------------------

    def _add_sums(self, active: SparseActivations) -> None:
        feature, value = active.feature, active.value
        self.count += torch.bincount(feature, minlength=self.n_features)
        self.total.index_add_(0, feature, value.double())
        self.maximum.scatter_reduce_(0, feature, value, "amax")
        # frexp: maximum = mantissa * 2^exponent with a mantissa below one.
        wanted = torch.where(self.maximum > 0, torch.frexp(self.maximum).exponent, NEVER)
        grown = ((wanted > self.exponent) & (self.exponent != NEVER)).nonzero().flatten()
        for rows in grown.split(_CHUNK):
            by = (wanted[rows] - self.exponent[rows]).clamp_max(31)
            self._merge_bins(rows, by)
            self._merge_bands(rows, by)
        self.exponent = wanted
        bin_ = self._cell(feature, value, self.config.n_bins)
        flat = self.histogram.view(-1)
        flat.index_add_(0, feature * self.config.n_bins + bin_, torch.ones_like(feature))

    def _cell(self, feature: Tensor, value: Tensor, n_cells: int) -> Tensor:
        """Which of ``n_cells`` equal parts of a feature's range a value is in."""
        share = torch.ldexp(value.double(), -self.exponent[feature].double())
        return (share * n_cells).long().clamp_max(n_cells - 1)

    def _merge_bins(self, rows: Tensor, by: Tensor) -> None:
        """Widen the bins of some features ``2^by`` times."""
        bins = torch.arange(self.config.n_bins)
        merged = torch.zeros(len(rows), self.config.n_bins, dtype=torch.int64)
        merged.scatter_add_(1, bins[None] >> by[:, None], self.histogram[rows])
        self.histogram[rows] = merged

    def _merge_bands(self, rows: Tensor, by: Tensor) -> None:
        n_bands = self.config.n_bands
        old = (rows[:, None] * n_bands + torch.arange(n_bands)).flatten()
        at, keys, payload = self.bands.take(old)
        feature, band = at // n_bands, at % n_bands
        self.bands.offer(rows[feature] * n_bands + (band >> by[feature]), keys, payload)

    # -- examples --------------------------------------------------------------------------------

    def _add_examples(
        self, contexts: Sequence[Tensor], active: SparseActivations, place: Tensor
    ) -> None:
        """Offer each (feature, context) with its peak to the tables."""
        peaks = peaks_of(active, place)
        feature, value, peak = peaks.feature, peaks.value, peaks.peak
        top_key = (value.view(torch.int32).long() << 32) | (_LIMIT - peak)
        band = feature * self.config.n_bands + self._cell(feature, value, self.config.n_bands)
        band_key = mixed(mixed(peak) ^ feature)
        is_top = self.top.accepts(feature, top_key)
        is_band = self.bands.accepts(band, band_key)
        either = (is_top | is_band).nonzero().flatten()
        window = peaks.windows(either, self.config.before, self.config.window)
        is_top, is_band = is_top[either], is_band[either]
        chosen = either[is_top]
        payload = {"window": window[is_top], "digest": self._digests(contexts, peak[chosen])}
        self.top.offer(feature[chosen], top_key[chosen], payload)
        chosen = either[is_band]
        payload = {"window": window[is_band], "peak": peak[chosen], "value": value[chosen]}
        self.bands.offer(band[chosen], band_key[chosen], payload)

    def _digests(self, contexts: Sequence[Tensor], peak: Tensor) -> Tensor:
        """Hashes of the windows around peaks in a batch."""
        starts = torch.tensor([0, *map(len, contexts)]).cumsum(0)
        places = peak - self.n_tokens
        before, width = self.config.before, self.config.window
        return window_digests(torch.cat(list(contexts)).cpu(), starts, places, before, width)

    # -- keeping ---------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Everything it holds, by name, for a file that ``load`` reads."""
        out = {name: getattr(self, name) for name in SUMS}
        out["seen"] = torch.tensor([self.n_tokens, self.n_positions])
        for table in TABLES:
            held: BestTable | ReferenceWindows = getattr(self, table)
            out |= {f"{table}.{name}": tensor for name, tensor in held.tensors().items()}
        return out

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``tensors`` gave for the same F and config."""
        for name in SUMS:
            getattr(self, name).copy_(tensors[name])
        self.n_tokens, self.n_positions = tensors["seen"].tolist()
        for table in TABLES:
            held: BestTable | ReferenceWindows = getattr(self, table)
            held.load({n: tensors[f"{table}.{n}"] for n in held.tensors()})

    def top_entries(self) -> tuple[Tensor, Tensor]:
        """Activation ``(F, K)`` float32 and place of the peak ``(F, K)`` int64 of the top
        examples; 0 where there are fewer."""
        keys, used = self.top.keys, self.top.keys >= 0
        value = (keys >> 32).int().view(torch.float32)
        return value.where(used, 0.0), (_LIMIT - (keys & _LIMIT)).where(used, 0)

    def finish(self) -> None:
        """Put the tables in order: examples by activation, reference windows by place."""
        self.top.sort()
        self.bands.sort()
        self.reference.sort()
