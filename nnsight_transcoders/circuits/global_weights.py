"""Global weights: how much features pass on to each other on average over a corpus.

A virtual weight says what would flow if its source were active; many large ones join features that
are never active together (interference). Here it is weighed with activations, over all positions of
a corpus and along the direct path through the residual stream:

* *input x gradient*, the activation times the weight at the denominators of that position (Eq. 7 of
  Dunefsky, Chlenski, Nanda 2024), as a mean over all positions and over those where the target is
  active;
* *TWERA*, target-weighted expected residual attribution (Ameisen et al. 2025, "Global Weights"):
  ``E[a_j a_i] / E[a_j] * V_ij``, which leaves out interference.

The corpus is streamed; sums are kept in float64 and saved, so that an interrupted pass goes on.

Legend: n source features, m target features, T positions, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from nnsight_transcoders.errors import InputError
from nnsight_transcoders.remote.server import Remote
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import Sites

from .collect import token_ids_of
from .corpus_state import CorpusState, load_state, next_digest, save_state
from .feature_values import FeatureValues, PairWeights
from .invariant import invariant_model

#: Most pairs of features at a time; each takes some 60 bytes.
MAX_PAIRS = 2**24


@dataclass(frozen=True)
class GlobalWeights:
    """What was found; all on the CPU in float64.

    Attributes:
        sources: The n ``(layer, feature)`` that write.
        targets: The m ``(layer, feature)`` that read.
        n_prompts: Prompts seen.
        n_positions: Positions seen, without the leading ones that the set leaves out.
        source_rate: ``(n,)`` share of the positions where a source is active.
        target_rate: ``(m,)`` the same of targets.
        virtual: ``(n, m)`` virtual weights; 0 where the target is not above the source.
        mean: ``(n, m)`` mean input x gradient over all positions.
        conditional_mean: ``(n, m)`` the same over positions where the target is active; 0 where it
            never is.
        twera: ``(n, m)`` target-weighted expected residual attribution; likewise.
    """

    sources: tuple[tuple[int, int], ...]
    targets: tuple[tuple[int, int], ...]
    n_prompts: int
    n_positions: int
    source_rate: Tensor
    target_rate: Tensor
    virtual: Tensor
    mean: Tensor
    conditional_mean: Tensor
    twera: Tensor

    def top(
        self, k: int = 20, by: str = "twera"
    ) -> list[tuple[tuple[int, int], tuple[int, int], float]]:
        """The largest by magnitude: source, target, value.

        Raises:
            InputError: ``k`` below 1, or ``by`` is none of the matrices.
        """
        known = ("twera", "mean", "conditional_mean", "virtual")
        if k < 1 or by not in known:
            raise InputError(f"k must be at least 1 and by one of {', '.join(known)}")
        flat: Tensor = getattr(self, by).flatten()
        found = flat.abs().topk(min(k, len(flat))).indices.tolist()
        width = len(self.targets)
        return [(self.sources[i // width], self.targets[i % width], float(flat[i])) for i in found]


def global_weights(
    model: Any,
    transcoders: TranscoderSet,
    corpus: Iterable[str | Sequence[int] | Tensor],
    sources: Sequence[tuple[int, int]],
    targets: Sequence[tuple[int, int]],
    *,
    state: str | Path | None = None,
    save_every: int = 100,
    max_tokens: int | None = None,
    verbose: bool = False,
    sites: Sites | None = None,
    remote: Remote | None = None,
) -> GlobalWeights:
    """Stream a corpus and weigh the connections of some features with their activations.

    Args:
        model: An nnsight model.
        transcoders: Its set; the layers of the chosen features stay in memory.
        corpus: Prompts, as text or token ids, run one at a time.
        sources: ``(layer, feature)`` of the features that write.
        targets: ``(layer, feature)`` of those that read.
        state: A file to keep the sums in. If it exists, the prompts that it has seen are skipped
            and the pass goes on from there, with the same result as if it had not stopped.
        save_every: Prompts between writes of the file.
        max_tokens: Cut prompts to so many tokens.
        verbose: Show progress.
        sites: The model's sites, where they have to be given by hand.
        remote: The model is on a server: True, an address, or a ``RemoteServer``. One request for
            each prompt brings its run.

    Raises:
        InputError: No target is above any source; too many pairs; a prompt that cannot be used; an
            empty corpus.
        MismatchError: The file belongs to other features, another set or another corpus.
    """
    _check(sources, targets, save_every, max_tokens)
    invariant = invariant_model(model, sites, remote)
    pairs = PairWeights(invariant, transcoders, sources, targets)
    values = FeatureValues(invariant, transcoders, sources, targets)
    path = None if state is None else Path(state)
    sums = load_state(path, pairs.virtual, sources, targets) or CorpusState.empty(pairs.virtual)
    prompts = iter(corpus)
    ids_of = _Tokens(model, invariant.sites, max_tokens)
    _skip(prompts, ids_of, sums)
    for prompt in tqdm(prompts, desc="corpus", disable=not verbose, leave=False):
        ids = ids_of(prompt)
        sums.add(values(invariant.run(ids)), pairs)
        sums.n_prompts += 1
        sums.digest = next_digest(sums.digest, ids)
        if path is not None and sums.n_prompts % save_every == 0:
            save_state(path, sums, pairs.virtual, sources, targets)
    if not sums.n_prompts:
        raise InputError("the corpus is empty")
    if path is not None:
        save_state(path, sums, pairs.virtual, sources, targets)
    return _result(sums, pairs.virtual, sources, targets)


class _Tokens:
    """From prompts to token ids, cut to a length."""

    def __init__(self, model: Any, sites: Sites, max_tokens: int | None) -> None:
        self._model, self._sites, self._limit = model, sites, max_tokens

    def __call__(self, prompt: str | Sequence[int] | Tensor) -> Tensor:
        if self._limit is not None:
            tokenizer = getattr(self._model, "tokenizer", None)
            if isinstance(prompt, str) and prompt and tokenizer is not None:
                prompt = tokenizer(prompt)["input_ids"]
            if not isinstance(prompt, str):
                prompt = torch.as_tensor(prompt)[..., : self._limit]
        return token_ids_of(self._model, prompt, self._sites)


def _skip(prompts: Any, ids_of: _Tokens, sums: CorpusState) -> None:
    """Pass over the prompts that the sums have seen, and check that they are the same ones."""
    digest, n = "", 0
    for prompt in islice(prompts, sums.n_prompts):
        digest, n = next_digest(digest, ids_of(prompt)), n + 1
    sums.check_corpus(digest, n)


def _check(
    sources: Sequence[Any], targets: Sequence[Any], save_every: int, max_tokens: int | None
) -> None:
    for name, value in (("save_every", save_every), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if len(sources) * len(targets) > MAX_PAIRS:
        raise InputError(
            f"{len(sources)} sources x {len(targets)} targets are more than {MAX_PAIRS} pairs: "
            "take them in several passes"
        )
    if not len(sources) or not len(targets):
        raise InputError("give at least one source and one target feature")


def _result(
    sums: CorpusState, virtual: Tensor, sources: Sequence[Any], targets: Sequence[Any]
) -> GlobalWeights:
    active, total = sums.target_count, sums.target_sum
    never = total == 0
    return GlobalWeights(
        sources=tuple((int(layer), int(i)) for layer, i in sources),
        targets=tuple((int(layer), int(i)) for layer, i in targets),
        n_prompts=sums.n_prompts,
        n_positions=sums.n_positions,
        source_rate=sums.source_count / max(1, sums.n_positions),
        target_rate=active / max(1, sums.n_positions),
        virtual=virtual.clone(),
        mean=sums.flow / max(1, sums.n_positions),
        conditional_mean=sums.active_flow / active.clamp_min(1),
        twera=(sums.joint / total.masked_fill(never, 1.0)) * virtual,
    )
