"""``FeatureReport``: what is known about one feature, for reading, printing and showing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnsight_transcoders._files import atomic_path

Ranked = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Label:
    """What a feature is said to mean.

    Attributes:
        text: In a few words; may be written by anybody, so it is never treated as markup.
        source: Who or which model wrote it.
        scores: Such as ``{"detection": 0.9}``.
    """

    text: str
    source: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Example:
    """A window of a text around an activation.

    Attributes:
        tokens: As text.
        token_ids: The same as ids.
        activations: One per token, 0 where the feature is not active; to three digits, and the
            largest exactly.
        peak: Which token has the largest activation of the whole context.
        context: Number of the context in the bundle's corpus.
        start: Position of the first token in its context.
        seen: Of a top example, how often its tokens stand in the text, in a window cut off in the
            same way; it is listed once. Else 1.
    """

    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    activations: tuple[float, ...]
    peak: int
    context: int
    start: int
    seen: int = 1

    @property
    def value(self) -> float:
        """The largest activation."""
        return self.activations[self.peak]

    def __str__(self) -> str:
        marked = (
            f"<<{token}>>" if value > 0 else token
            for token, value in zip(self.tokens, self.activations, strict=True)
        )
        return "".join(marked)


@dataclass(frozen=True)
class ExampleGroup:
    """Examples of one range of activation.

    Attributes:
        name: ``"Top"``, or the range as text.
        low: Smallest activation in it.
        high: Largest.
        examples: ``Top``: the largest first, each window of tokens once. Else a uniform sample of
            the contexts whose largest activation is from ``low`` (included) to ``high``.
    """

    name: str
    low: float
    high: float
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Histogram:
    """How the activations of a feature are distributed, where it is active.

    Attributes:
        counts: Positions per bin; bin ``i`` is from ``i * width`` to ``(i + 1) * width``.
        width: Of each bin.
    """

    counts: tuple[int, ...]
    width: float


@dataclass(frozen=True)
class Coactive:
    """A feature that is active at the same positions.

    Attributes:
        layer: Its layer.
        index: Its number.
        overlap: Estimated share, of the positions where either is active, of those where both are.
    """

    layer: int
    index: int
    overlap: float


@dataclass(frozen=True)
class FeatureReport:
    """What a bundle knows about one feature.

    Attributes:
        layer: Its layer.
        index: Its number.
        label: What it is said to mean, if somebody said so.
        n_active: Positions where it is active.
        density: Their share of the measured positions.
        max_activation: Largest activation.
        mean_activation: Mean over the positions where it is active; 0 without any.
        histogram: Of its activations there.
        groups: Examples: ``"Top"`` first, then bands of activation from the highest.
        top_logits: Tokens that it raises most, whatever the input (see ``logit_effects``).
        bottom_logits: Tokens that it lowers most.
        de_embedding: Tokens that would switch it on most (see ``de_embeddings``).
        coactive: Features that are active at the same positions, by overlap.
    """

    layer: int
    index: int
    label: Label | None
    n_active: int
    density: float
    max_activation: float
    mean_activation: float
    histogram: Histogram
    groups: tuple[ExampleGroup, ...]
    top_logits: Ranked
    bottom_logits: Ranked
    de_embedding: Ranked
    coactive: tuple[Coactive, ...]

    @property
    def title(self) -> str:
        """The feature's name."""
        return f"Feature {self.index} of layer {self.layer}"

    @property
    def examples(self) -> tuple[Example, ...]:
        """The examples with the largest activations."""
        return self.groups[0].examples if self.groups else ()

    def __str__(self) -> str:
        lines = [self.title + (f": {self.label}" if self.label else "")]
        lines.append(
            f"  active at {self.n_active} positions ({self.density:.3%}), mean "
            f"{self.mean_activation:.3g}, largest {self.max_activation:.3g}"
        )
        lists = {
            "raises": self.top_logits,
            "lowers": self.bottom_logits,
            "de-embedding": self.de_embedding,
        }
        for name, ranked in lists.items():
            if ranked:
                found = ", ".join(f"{token!r} {value:+.2f}" for token, value in ranked)
                lines.append(f"  {name}: {found}")
        if self.coactive:
            found = ", ".join(f"L{c.layer}/{c.index} {c.overlap:.2f}" for c in self.coactive)
            lines.append(f"  active with: {found}")
        for example in self.examples[:5]:
            seen = f"  (seen {example.seen} times)" if example.seen > 1 else ""
            lines.append(f"  {example.value:8.3f}  {str(example)!r}{seen}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, in the form that the pages show."""
        return {
            "layer": self.layer,
            "index": self.index,
            "label": self.label.text if self.label else None,
            "label_source": self.label.source if self.label else None,
            "label_scores": dict(self.label.scores) if self.label else {},
            "n_active": self.n_active,
            "density": self.density,
            "max_activation": self.max_activation,
            "mean_activation": self.mean_activation,
            "histogram": {"counts": list(self.histogram.counts), "width": self.histogram.width},
            "groups": [
                {
                    "name": group.name,
                    "low": group.low,
                    "high": group.high,
                    "examples": [_example(example) for example in group.examples],
                }
                for group in self.groups
            ],
            "top_logits": [list(pair) for pair in self.top_logits],
            "bottom_logits": [list(pair) for pair in self.bottom_logits],
            "de_embedding": [list(pair) for pair in self.de_embedding],
            "coactive": [
                {"layer": c.layer, "index": c.index, "overlap": c.overlap} for c in self.coactive
            ],
        }

    def to_html(self, path: str | Path | None = None) -> str:
        """Its dashboard as one self-contained page; written to ``path`` if given, and returned.

        Raises:
            InputError: The file cannot be written.
        """
        from nnsight_transcoders.viewer.dashboard import render_features

        page = render_features([self.to_dict()], title=self.title)
        if path is not None:
            with atomic_path(Path(path)) as partial:
                partial.write_text(page, encoding="utf-8", errors="replace")
        return page

    def _repr_html_(self) -> str:
        from nnsight_transcoders.viewer.page import frame

        return frame(self.to_html(), self.title, 620)


def _example(example: Example) -> dict[str, Any]:
    return {
        "tokens": list(example.tokens),
        "activations": [float(f"{value:.4g}") for value in example.activations],
        "peak": example.peak,
        "context": example.context,
        "start": example.start,
        "seen": example.seen,
    }
