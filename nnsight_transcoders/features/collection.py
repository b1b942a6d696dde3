"""``collect_features``: one pass over a text, and a bundle of what each feature responds to.

The model runs on a few contexts at a time through nnsight; of each batch only the active features
are kept, until they are counted (``statistics.py``). Memory depends on the number of features and
not on the text. An interrupted pass goes on from its last state and ends with the same bundle.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from nnsight_transcoders.errors import InputError
from nnsight_transcoders.evaluation.token_batches import (
    default_context,
    special_token_ids,
    stream_pieces,
)
from nnsight_transcoders.models import hf_module, hub_name
from nnsight_transcoders.remote.server import Remote, remote_server
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites, resolve_sites
from nnsight_transcoders.training.stream import kept_positions

from .activations import ActivationReader
from .bundle import FeatureBundle
from .bundle_files import INDEX, Contents, write_bundle
from .progress import Progress
from .statistics import FeatureStatistics, StatisticsConfig
from .vocabulary import token_lists, vocabulary_texts


def collect_features(
    model: Any,
    transcoders: TranscoderSet,
    texts: Any,
    path: str | Path,
    *,
    layers: Sequence[int] | None = None,
    context: int | None = None,
    batch_size: int = 16,
    max_tokens: int | None = None,
    config: StatisticsConfig | None = None,
    n_tokens_listed: int = 10,
    n_coactive: int = 10,
    save_every: int = 100,
    sites: Sites | None = None,
    remote: Remote | None = None,
    verbose: bool = False,
) -> FeatureBundle:
    """Collect what features respond to on a text, into a bundle.

    Special tokens (BOS and the like) and the leading positions that the set leaves out are run and
    not counted. Activations are computed in the transcoders' dtype, as in ``attach``.

    Args:
        model: An nnsight model.
        transcoders: Its set.
        texts: Texts or token ids; or a text file, a folder of them, a data set with a column
            ``text``, or ``"builtin"``.
        path: Folder of the bundle. If an interrupted pass left its files there, it goes on, with
            the same result as if it had not stopped; ``texts`` must be the same.
        layers: Which of the set's layers (default: all).
        context: Tokens that are run together (default: 128, or the model's limit if that is less).
        batch_size: Contexts per run.
        max_tokens: Stop after so many tokens.
        config: What is kept of each feature.
        n_tokens_listed: Tokens in each list of logit effects and of the de-embedding; 0: no lists.
        n_coactive: Co-active features listed.
        save_every: Batches between states.
        sites: The model's sites, where they have to be given by hand.
        remote: The model is on a server: True, an address, or a ``RemoteServer``. Its values at the
            input sites come back and are encoded here; the lists of tokens are made there, from
            two vectors of each feature.
        verbose: Show progress.

    Raises:
        InputError: A finished bundle in the folder, no text, or an option out of range.
        MismatchError: The set does not fit the model; or the folder has an unfinished pass over
            other features, with other settings or over another text.
    """
    folder, config = Path(path), config or StatisticsConfig()
    module = hf_module(model, weights=remote_server(remote) is None)
    sites = sites or resolve_sites(module)
    transcoders.check_model(sites.d_model, sites.n_layers, type(module).__name__)
    chosen = _layers(transcoders, layers)
    context = default_context(sites) if context is None else context
    _check(folder, texts, max_tokens, batch_size, n_tokens_listed, n_coactive, save_every)
    widths = [transcoders.config(layer).d_transcoder for layer in chosen]
    record = {
        "model": hub_name(module) or type(module).__name__,
        "transcoders": transcoders.provenance,
        "layers": dict(zip(map(str, chosen), widths, strict=True)),
        "weights": _fingerprint(transcoders, chosen),
        "dtype": str(transcoders.dtype or transcoders.config(chosen[0]).dtype),
        "context": context,
        "statistics": asdict(config),
    }
    statistics = FeatureStatistics(sum(widths), config)
    reader = ActivationReader(model, sites, transcoders, chosen, remote)
    pieces = stream_pieces(model, texts, sites, context=context, max_tokens=max_tokens)
    with closing(Progress(folder, record, statistics)) as progress:
        _pass(model, reader, pieces, progress, statistics, batch_size, save_every, verbose=verbose)
        contents = Contents(record, statistics, progress.tokens(), progress.starts)
        vocabulary = vocabulary_texts(model, sites.vocab_size)
        lists = {}
        if n_tokens_listed:
            top = min(n_tokens_listed, sites.vocab_size)
            lists = token_lists(model, transcoders, chosen, top, sites, remote, verbose=verbose)
        write_bundle(folder, contents, vocabulary, lists, n_coactive, verbose=verbose)
        progress.remove()
    return FeatureBundle.open(folder)


def _pass(
    model: Any,
    reader: ActivationReader,
    pieces: Iterator[Tensor],
    progress: Progress,
    statistics: FeatureStatistics,
    batch_size: int,
    save_every: int,
    *,
    verbose: bool,
) -> None:
    """Run what a state does not have yet."""
    special, leading = special_token_ids(model), reader.leading_positions
    under_way: deque[tuple[list[Tensor], Tensor]] = deque()

    def batches(bar: tqdm) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in _batches(pieces, progress, batch_size, bar):
            lengths = [len(piece) for piece in batch]
            ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
            measured = kept_positions(ids, lengths, leading, special)
            under_way.append((batch, measured))
            yield ids, measured

    with tqdm(desc="tokens", unit="tok", disable=not verbose, leave=False) as bar:
        for number, active in enumerate(reader.stream(batches(bar)), 1):
            batch, measured = under_way.popleft()
            statistics.add(batch, active, int(measured.sum()))
            progress.append(batch)
            bar.update(sum(map(len, batch)))
            if number % save_every == 0:
                progress.save()
    progress.check_all_seen()
    progress.save()
    if not statistics.n_positions:
        raise InputError(
            "the text has no position to measure: it needs pieces of at least two tokens that are "
            "not special ones"
        )


def _batches(
    pieces: Iterator[Tensor], progress: Progress, size: int, bar: tqdm
) -> Iterator[list[Tensor]]:
    batch: list[Tensor] = []
    for piece in pieces:
        if progress.seen(piece):
            bar.update(len(piece))
            continue
        batch.append(piece)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _layers(transcoders: TranscoderSet, layers: Sequence[int] | None) -> list[int]:
    chosen = sorted(set(transcoders.layers if layers is None else layers))
    if not chosen:
        raise InputError("layers is empty: name at least one")
    for layer in chosen:
        transcoders.config(layer)  # which checks that it is there
    return chosen


def _check(folder: Path, texts: Any, max_tokens: int | None, *numbers: int) -> None:
    names = ("batch_size", "n_tokens_listed", "n_coactive", "save_every")
    for name, value, least in zip(names, numbers, (1, 0, 1, 1), strict=True):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    if (folder / INDEX).exists():
        raise InputError(
            f"{folder} already holds a finished bundle: open it with FeatureBundle.open, or give "
            "another folder"
        )
    if isinstance(texts, str) and texts == "builtin" and max_tokens is None:
        raise InputError("the builtin text has no end: give max_tokens")


def _fingerprint(transcoders: TranscoderSet, layers: Sequence[int]) -> str:
    """A digest of a few encoder rows, to tell one set from another of the same name."""
    digest = hashlib.sha256()
    for layer in layers:
        width = transcoders.config(layer).d_transcoder
        rows = transcoders.rows(layer, sorted({0, width // 2, width - 1}), "encoder")
        digest.update(rows.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]
