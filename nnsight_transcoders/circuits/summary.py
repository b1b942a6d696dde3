"""A feature on one page: what drives it on a prompt, what it writes, which tokens it would read.

The paper's feature dashboards (Dunefsky, Chlenski, Nanda 2024), as text and as a self-contained
HTML page without a script. Token texts and other people's labels are treated as hostile: whatever
comes from outside is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from torch import Tensor

from nnsight_transcoders._files import atomic_path
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.remote.server import Remote
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites

from .collect import token_texts
from .contributions import CircuitRun
from .paths import Path, top_paths
from .weights import de_embeddings, logit_effects

Ranked = tuple[tuple[str, float], ...]

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin: 1.4rem 0 .3rem }
table { border-collapse: collapse } td, th { padding: .1rem .7rem .1rem 0; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums }
code { background: #8882; padding: 0 .25em; white-space: pre-wrap }
mark { background: #f5c04a; color: #1a1a1a } .lists { display: flex; flex-wrap: wrap; gap: 2rem }
@media (prefers-color-scheme: dark) { body { color: #e8e8e8; background: #181818 } }
"""


@dataclass(frozen=True)
class FeatureSummary:
    """What ``feature_summary`` found; ``print`` it, or ``to_html``.

    Attributes:
        layer: The feature's layer.
        index: Its number.
        position: The position it was taken apart at; None without a run.
        activation: Its activation there; None without a run.
        tokens: The prompt's tokens as text; empty without a run.
        paths: The paths that carry most into it there, in units of its pre-activation.
        top_logits: Tokens that it raises most, whatever the input (see ``logit_effects``).
        bottom_logits: Tokens that it lowers most.
        de_embedding: Tokens that would switch it on most (see ``de_embeddings``).
        statistics: What the caller knows of its activations.
    """

    layer: int
    index: int
    position: int | None
    activation: float | None
    tokens: tuple[str, ...]
    paths: tuple[Path, ...]
    top_logits: Ranked
    bottom_logits: Ranked
    de_embedding: Ranked
    statistics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The feature's name."""
        return f"Feature {self.index} of layer {self.layer}"

    @property
    def _lists(self) -> tuple[tuple[str, Ranked], ...]:
        return (
            ("Raises", self.top_logits),
            ("Lowers", self.bottom_logits),
            ("De-embedding", self.de_embedding),
        )

    def __str__(self) -> str:
        lines = [self.title]
        if self.position is not None:
            token = self.tokens[self.position]
            lines.append(f"  activation {self.activation:.3f} at {self.position} {token!r}")
            lines += ["  paths into it:", *(f"    {path}" for path in self.paths)]
        for name, tokens in self._lists:
            found = ", ".join(f"{token!r} {value:+.2f}" for token, value in tokens)
            lines.append(f"  {name.lower()}: {found}")
        lines += [f"  {name}: {value}" for name, value in self.statistics.items()]
        return "\n".join(lines)

    def to_html(self, path: str | FilePath | None = None) -> str:
        """One self-contained page without a script; written to ``path`` if given, and returned.

        Raises:
            InputError: The file cannot be written.
        """
        page = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head>"
            f"<body>{self._body()}</body></html>"
        )
        if path is not None:
            with atomic_path(FilePath(path)) as partial:
                partial.write_text(page, encoding="utf-8", errors="replace")
        return page

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{html.escape(self.to_html())}" sandbox title="{self.title}" ' + (
            'style="width: 100%; height: 600px; border: 0"></iframe>'
        )

    def _body(self) -> str:
        parts = [f"<h1>{html.escape(self.title)}</h1>"]
        if self.position is not None:
            parts.append(f"<p>Activation {self.activation:.3f} on</p><p>{self._prompt()}</p>")
            rows = [(f"{p.value:+.4f}", str(p).partition("  ")[2]) for p in self.paths]
            parts.append(f"<h2>Paths into it</h2>{_table(rows)}")
        lists = (
            f"<div><h2>{name}</h2>{_table([(f'{v:+.2f}', repr(t)) for t, v in tokens])}</div>"
            for name, tokens in self._lists
        )
        parts.append(f'<div class="lists">{"".join(lists)}</div>')
        if self.statistics:
            rows = [(str(value), str(name)) for name, value in self.statistics.items()]
            parts.append(f"<h2>Activation statistics</h2>{_table(rows)}")
        return "".join(parts)

    def _prompt(self) -> str:
        marked = (
            f"<mark>{html.escape(token)}</mark>" if i == self.position else html.escape(token)
            for i, token in enumerate(self.tokens)
        )
        return f"<code>{''.join(marked)}</code>"


def _table(rows: list[tuple[str, str]]) -> str:
    """A table of (number, text) rows, escaped."""
    cells = (
        f'<tr><td class="n">{html.escape(number)}</td>'
        f"<td><code>{html.escape(text)}</code></td></tr>"
        for number, text in rows
    )
    return f"<table>{''.join(cells)}</table>"


def feature_summary(
    model: Any,
    transcoders: TranscoderSet,
    layer: int,
    index: int,
    *,
    circuit: CircuitRun | None = None,
    position: int | None = None,
    statistics: Mapping[str, Any] | None = None,
    top: int = 8,
    depth: int = 3,
    sites: Sites | None = None,
    remote: Remote | None = None,
) -> FeatureSummary:
    """Summarise a feature.

    Args:
        model: An nnsight model.
        transcoders: Its set.
        layer: The feature's layer.
        index: Its number.
        circuit: A run of a prompt, for the paths into the feature; without it the summary has only
            what does not depend on the input.
        position: Where to take it apart (default: where it is most active).
        statistics: What is known of its activations over text, shown as it is
            (``{"fires on": "0.4 % of tokens"}``).
        top: How many paths, and tokens per list.
        depth: Longest path, in components.
        sites: The model's sites, where they have to be given by hand.
        remote: The model is on a server: True, an address, or a ``RemoteServer``.

    Raises:
        InputError: The set has no such layer or feature, or it is not active on the run.
    """
    check_feature(transcoders, layer, index)
    if circuit is None and position is not None:
        raise InputError("a position needs a run: pass circuit=CircuitRun.collect(...)")
    driven: dict[str, Any] = {"position": None, "activation": None, "tokens": (), "paths": ()}
    if circuit is not None:
        driven = _driven(circuit, layer, index, position, top, depth)
    where: dict[str, Any] = {"sites": sites, "remote": remote}
    effects = logit_effects(model, transcoders, layer, [index], **where)[0]
    reads = de_embeddings(model, transcoders, layer, [index], **where)[0]
    return FeatureSummary(
        layer=layer,
        index=index,
        **driven,
        top_logits=ranked_tokens(model, effects, top),
        bottom_logits=ranked_tokens(model, effects, top, largest=False),
        de_embedding=ranked_tokens(model, reads, top),
        statistics=dict(statistics or {}),
    )


def _driven(
    circuit: CircuitRun, layer: int, index: int, position: int | None, top: int, depth: int
) -> dict[str, Any]:
    """The fields of a summary that depend on a run."""
    position = _peak(circuit, layer, index) if position is None else position
    target = circuit.feature(layer, index, position)
    return {
        "position": target.position,
        "activation": activations(circuit, layer, index)[target.position],
        "tokens": circuit.token_texts,
        "paths": tuple(top_paths(circuit, target, depth=depth)[:top]),
    }


def check_feature(transcoders: TranscoderSet, layer: int, index: int) -> None:
    """Check that a set has a feature.

    Raises:
        InputError: It has no such layer or feature.
    """
    if layer not in transcoders:
        known = ", ".join(map(str, transcoders.layers))
        raise InputError(f"layers {known} have transcoders, not {layer}")
    width = transcoders.config(layer).d_transcoder
    if not 0 <= index < width:
        raise InputError(f"layer {layer} has features 0 to {width - 1}, got {index}")


def activations(circuit: CircuitRun, layer: int, index: int) -> dict[int, float]:
    """Position -> activation of a feature on a run, where it is active."""
    active = circuit.active.layers[layer]
    rows = (active.index == index).nonzero().flatten()
    return dict(zip(active.position[rows].tolist(), active.activation[rows].tolist(), strict=True))


def _peak(circuit: CircuitRun, layer: int, index: int) -> int:
    found = activations(circuit, layer, index)
    if not found:
        raise InputError(
            f"feature {index} of layer {layer} is not active on this prompt: take another prompt, "
            "or leave circuit out for what does not depend on the input"
        )
    return max(found, key=lambda position: found[position])


def ranked_tokens(model: Any, values: Tensor, top: int, *, largest: bool = True) -> Ranked:
    """The tokens with the largest (or smallest) of one value ``(V,)`` per vocabulary item."""
    best = values.topk(min(top, len(values)), largest=largest)
    return tuple(zip(token_texts(model, best.indices), best.values.tolist(), strict=True))
