"""Does a transcoder set fit its model? ``verify`` answers in numbers, in one call.

A wrong hook point, a folded norm, a swapped matrix or a missing scale loads without an error and
shows up as strange circuits. Here it shows up as a fraction of variance unexplained above one.

    FVU = sum |y - y_hat|^2 / sum |y - mean y|^2        over all positions of the text
    L0  = mean number of active features per position
    CE  = mean cross-entropy of the next token, in nats

Padding and the leading positions that a set was not trained on are left out. Where a layer fails,
the neighbouring ways to read the set are tried on the same text, and the one that fits is named.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import nnsight
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from nnsight_transcoders.attachment.edit import attached
from nnsight_transcoders.builtin.text import PIECE, sentences
from nnsight_transcoders.models import hf_module
from nnsight_transcoders.remote.server import Remote, RemoteServer, remote_server
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites, resolve_sites

from .fit_sums import FitSums, FitTotals
from .hypotheses import NONE_FITS, explain, rank_hypotheses
from .joint_fit import joint_fit
from .remote_fit import RemoteMeasurement
from .site_values import read_sites
from .token_batches import default_context, token_pieces, unpadded_batches

#: Text for a first check when the caller gives none.
DEFAULT_TEXT = (
    "The river rises in the hills above the old market town and runs for forty miles to the sea. "
    "In spring its meadows flood, and the farmers move their cattle to higher ground.",
    "When the committee met on Tuesday, the chair explained that the budget had been approved, but "
    "that two of the larger projects would have to wait until the following year.",
    "Light travels at about three hundred thousand kilometres per second. A signal from the Earth "
    "takes a little more than one second to reach the Moon and about eight minutes to the Sun.",
    "She opened the letter slowly, read it twice, and put it back into the drawer. Nobody in the "
    "house ever learned what her brother had written from the island.",
)
#: Pieces of text that are run at once.
BATCH_SIZE = 16
#: Up to where the FVU of a fitting layer may go, and from where it says that nothing fits.
FITS_BELOW, FAILS_FROM = 0.8, 1.0

Verdict = Literal["fits", "weak", "does not fit"]


@dataclass(frozen=True)
class LayerFit:
    """How one layer's transcoder does.

    Attributes:
        layer: Which layer.
        fvu: Fraction of variance unexplained (see the module's docstring).
        l0: Active features per position.
        ce_change: Rise of the cross-entropy in nats when this layer's MLP alone is replaced; None
            for a cross-layer or jointly chosen set, whose layers need each other.
        verdict: ``"fits"``, ``"weak"`` or ``"does not fit"``.
        hypothesis: Of a layer that does not fit, the other way to read it that does, such as
            ``"input site N0 instead of N1 (FVU 0.07)"``, or that there is none. Of a weak one, such
            a way if it leaves half as much unexplained or less. Else None.
    """

    layer: int
    fvu: float
    l0: float
    ce_change: float | None
    verdict: Verdict
    hypothesis: str | None = None


@dataclass(frozen=True)
class FitReport:
    """What ``verify`` found.

    Attributes:
        n_tokens: Positions measured.
        ce: Cross-entropy of the model itself, in nats.
        ce_replaced: The same with all of the set's layers replaced.
        layers: Layer by layer.
    """

    n_tokens: int
    ce: float
    ce_replaced: float
    layers: tuple[LayerFit, ...]

    @property
    def ok(self) -> bool:
        """Whether no layer fails."""
        return all(layer.verdict != "does not fit" for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"ok": self.ok}


def verify(
    model: Any,
    transcoders: TranscoderSet,
    text: str | Sequence[str | Sequence[int] | Tensor] | None = None,
    *,
    sites: Sites | None = None,
    remote: Remote | None = None,
    verbose: bool = False,
) -> FitReport:
    """Measure how well a set fits a model, on a short text.

    Args:
        model: An nnsight model.
        transcoders: The set.
        text: A text, or several; or lists of token ids. Long ones are cut into pieces of 128
            tokens (or the model's limit). Default: a few English sentences (for the builtin model:
            its own).
        sites: The model's sites, where they have to be given by hand.
        remote: Run the model on a server: True, an address, or a ``RemoteServer``. The set stays
            here (a small one travels); the model's weights need not be here.
        verbose: Show progress.

    Raises:
        MismatchError: The set does not fit the model's shape.
        InputError: No text with at least two tokens.
        RemoteError: The server, or a job there, failed.
    """
    server = remote_server(remote)
    module = hf_module(model, weights=server is None)
    sites = sites or resolve_sites(module)
    transcoders.check_model(sites.d_model, sites.n_layers, type(module).__name__)
    if text is None:
        text = _default_text(model)
    texts = [text] if isinstance(text, str) else text
    pieces = token_pieces(model, texts, sites, context=default_context(sites))
    batches = unpadded_batches(pieces, batch_size=BATCH_SIZE)
    together = transcoders.cross_layer or transcoders.joint_k is not None
    singles = [] if together else list(transcoders.layers)
    n_predicted = sum(ids[:, 1:].numel() for ids in batches)
    if server is None:
        found = _measured(model, transcoders, batches, sites, singles, verbose)
    else:
        measurement = RemoteMeasurement(model, transcoders, sites, server, singles)
        found = measurement.measure(batches, verbose)
    sums, ce, ce_replaced = found.sums, found.ce, found.ce_replaced
    changes: dict[int, float | None] = dict.fromkeys(transcoders.layers)
    for layer, single in found.ce_single.items():
        changes[layer] = (single - ce) / n_predicted
    fits = [_fit(layer, sums[layer], changes[layer]) for layer in transcoders.layers]
    fits = _explained(model, transcoders, fits, batches, sites, server)
    n_tokens = int(sums[transcoders.layers[0]].n)
    return FitReport(n_tokens, ce / n_predicted, ce_replaced / n_predicted, tuple(fits))


def _measured(
    model: Any,
    transcoders: TranscoderSet,
    batches: Sequence[Tensor],
    sites: Sites,
    singles: Sequence[int],
    verbose: bool,
) -> FitTotals:
    """What ``RemoteMeasurement`` gives, of a model that is here: by attaching the set."""
    single: dict[int, float] = {}
    passes = tqdm(total=3 + len(singles), desc="verify", disable=not verbose, leave=False)
    with passes:
        ce = _cross_entropy(model, batches)
        passes.update()
        if transcoders.joint_k is not None:
            sums, ce_replaced = joint_fit(model, transcoders, batches, sites)
        else:
            sums = _fit_sums(model, transcoders, batches, sites)
            passes.update()
            with attached(model, transcoders, sites=sites) as replaced:
                ce_replaced = _cross_entropy(replaced, batches)
        passes.update()
        for layer in singles:
            with attached(model, transcoders, [layer], sites=sites) as replaced:
                single[layer] = _cross_entropy(replaced, batches)
            passes.update()
    return FitTotals(sums, ce, ce_replaced, single)


def _default_text(model: Any) -> Sequence[str]:
    """The builtin model's sentences where a tokenizer has all their words, else English.

    By the tokenizer, not the model's name, since a server or a copy may call it something else.
    """
    builtin = sentences(48, seed=1)
    tokenizer = getattr(model, "tokenizer", None)
    known = {} if tokenizer is None else tokenizer.get_vocab()
    words = (word for sentence in builtin for word in re.findall(PIECE, sentence))
    return builtin if all(word in known for word in words) else DEFAULT_TEXT


def _fit(layer: int, sums: FitSums, change: float | None) -> LayerFit:
    fvu = sums.fvu()
    verdict: Verdict = "does not fit"
    if fvu < FAILS_FROM:
        verdict = "fits" if fvu < FITS_BELOW else "weak"
    return LayerFit(layer, fvu, sums.l0, change, verdict)


def _explained(
    model: Any,
    transcoders: TranscoderSet,
    fits: Sequence[LayerFit],
    batches: Sequence[Tensor],
    sites: Sites,
    server: RemoteServer | None,
) -> list[LayerFit]:
    """The same with the hypotheses of the layers that do not fit well."""
    poor = {fit.layer: fit for fit in fits if fit.verdict != "fits"}
    together = transcoders.cross_layer or transcoders.joint_k is not None
    groups = [list(transcoders.layers)] if together else [[n] for n in poor]
    found: dict[int, str | None] = {}
    for group in groups if poor else ():
        leading = {layer: transcoders.config(layer).leading_positions for layer in group}
        if together:  # all parts on the same positions
            leading = dict.fromkeys(group, max(leading.values()))
        values = read_sites(model, sites, leading, batches, server)
        modules = {layer: transcoders[layer] for layer in group}
        for layer, ranked in rank_hypotheses(modules, values, FITS_BELOW).items():
            if layer in poor:
                failed = poor[layer].verdict == "does not fit"
                good = FITS_BELOW if failed else poor[layer].fvu / 2
                found[layer] = explain(ranked, good) or (NONE_FITS if failed else None)
    return [replace(fit, hypothesis=found.get(fit.layer)) for fit in fits]


def _fit_sums(
    model: Any, transcoders: TranscoderSet, batches: Sequence[Tensor], sites: Sites
) -> dict[int, FitSums]:
    layers = transcoders.layers
    sums = {layer: FitSums(sites.d_model) for layer in layers}
    with attached(model, transcoders, mode="observe", sites=sites) as watched:
        for ids in batches:
            values = _observe(watched, layers, ids)
            for layer, (features, reconstruction, error) in zip(layers, values, strict=True):
                start = transcoders.config(layer).leading_positions
                columns = [part[:, start:].flatten(0, 1) for part in (reconstruction, error)]
                active = int(features[:, start:].count_nonzero())
                sums[layer].add(columns[0] + columns[1], columns[1], active)
    return sums


def _observe(watched: Any, layers: Sequence[int], ids: Tensor) -> list[tuple]:
    with torch.no_grad():
        with watched.trace(ids):
            values = nnsight.save([])
            for layer in layers:
                node = watched.transcoders[layer]
                features = node.features.output
                reconstruction = node.reconstruction.output
                values.append((features, reconstruction, node.error.output))
    return values


def _cross_entropy(model: Any, batches: Sequence[Tensor]) -> float:
    """Sum of the next-token cross-entropies in nats."""
    total = 0.0
    for ids in batches:
        with torch.no_grad():
            with model.trace(ids):
                logits = model.output.logits.save()
        predicted, actual = logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
        actual = actual.to(predicted.device)
        total += float(F.cross_entropy(predicted, actual, reduction="sum"))
    return total
