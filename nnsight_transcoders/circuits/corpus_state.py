"""The running sums of a pass over a corpus, and the file that they survive in.

One safetensors file holds the sums, what they are sums of, and (as JSON in its header) how far the
pass got and a digest of the prompts seen, so that a pass never goes on with other features, another
set or another corpus. It is written beside the old one and then takes its place.

Legend: n source features, m target features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nnsight_transcoders._files import atomic_path
from nnsight_transcoders.errors import CheckpointError, MismatchError

from .feature_values import PairWeights, Values

_VERSION = 1
_SUMS = ("source_count", "target_count", "target_sum", "joint", "flow", "active_flow")


@dataclass
class CorpusState:
    """Sums over the positions seen so far, in float64.

    Attributes:
        source_count: ``(n,)`` positions where a source is active.
        target_count: ``(m,)`` the same of targets.
        target_sum: ``(m,)`` activations of targets.
        joint: ``(n, m)`` products of the two activations.
        flow: ``(n, m)`` input x gradient.
        active_flow: ``(n, m)`` the same where the target is active.
        n_positions: Positions.
        n_prompts: Prompts.
        digest: Of the prompts' token ids, in order.
    """

    source_count: Tensor
    target_count: Tensor
    target_sum: Tensor
    joint: Tensor
    flow: Tensor
    active_flow: Tensor
    n_positions: int = 0
    n_prompts: int = 0
    digest: str = ""

    @classmethod
    def empty(cls, like: Tensor) -> CorpusState:
        """Nothing seen; ``like`` is ``(n, m)``."""
        source, target = torch.zeros_like(like[:, 0]), torch.zeros_like(like[0])
        pair = torch.zeros_like(like)
        return cls(source, target, target.clone(), pair, pair.clone(), pair.clone())

    def add(self, values: Values, pairs: PairWeights) -> None:
        """Add one run's positions."""
        fires = (values.targets > 0).double()
        self.source_count += (values.sources > 0).double().sum(0)
        self.target_count += fires.sum(0)
        self.target_sum += values.targets.sum(0)
        self.joint += values.sources.T @ values.targets
        for group, weights in pairs.groups.items():
            written = (values.sources * values.write[group]).T
            self.flow += (written @ values.read) * weights
            self.active_flow += (written @ (values.read * fires)) * weights
        self.n_positions += len(values.sources)

    def check_corpus(self, digest: str, n_prompts: int) -> None:
        """Check that the prompts skipped are the ones that were seen.

        Raises:
            MismatchError: They are not.
        """
        if (digest, n_prompts) != (self.digest, self.n_prompts):
            raise MismatchError(
                f"the first {self.n_prompts} prompts of this corpus are not those that the saved "
                "sums were made of: give the same corpus, or another state file"
            )


def next_digest(digest: str, token_ids: Tensor) -> str:
    """The digest after one more prompt."""
    ids = json.dumps(token_ids.tolist())
    return hashlib.sha256(f"{digest}:{ids}".encode()).hexdigest()


def save_state(
    path: Path,
    sums: CorpusState,
    virtual: Tensor,
    sources: Sequence[tuple[int, int]],
    targets: Sequence[tuple[int, int]],
) -> None:
    """Write the sums and what they belong to.

    Raises:
        InputError: The file cannot be written.
    """
    tensors = {name: getattr(sums, name).contiguous() for name in _SUMS}
    tensors |= {"virtual": virtual.contiguous(), **_names(sources, targets)}
    progress = {
        "version": _VERSION,
        "n_positions": sums.n_positions,
        "n_prompts": sums.n_prompts,
        "digest": sums.digest,
    }
    with atomic_path(path) as partial:
        save_file(tensors, partial, metadata={"progress": json.dumps(progress)})


def load_state(
    path: Path | None,
    virtual: Tensor,
    sources: Sequence[tuple[int, int]],
    targets: Sequence[tuple[int, int]],
) -> CorpusState | None:
    """The sums in a file, or None if there is no file.

    Raises:
        CheckpointError: The file is damaged or something else.
        MismatchError: It belongs to other features, or to another set or model.
    """
    if path is None or not path.exists():
        return None
    tensors, progress = _read(path)
    names = _names(sources, targets)
    if any(not torch.equal(tensors[name], names[name]) for name in names):
        raise MismatchError(f"{path} has the sums of other features: give another state file")
    if not torch.allclose(tensors["virtual"], virtual, rtol=1e-4, atol=1e-6):
        raise MismatchError(
            f"{path} has the sums of another transcoder set or model: give another state file"
        )
    return CorpusState(
        **{name: tensors[name] for name in _SUMS},
        n_positions=progress["n_positions"],
        n_prompts=progress["n_prompts"],
        digest=progress["digest"],
    )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    wanted = [*_SUMS, "virtual", "sources", "targets"]
    try:
        with safe_open(path, "pt") as file:
            progress = json.loads((file.metadata() or {})["progress"])
            tensors = {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is no state of a pass over a corpus: {error}") from error
    if progress.get("version") != _VERSION:
        raise CheckpointError(f"{path} was written by another version of this package")
    return tensors, progress


def _names(sources: Sequence[Any], targets: Sequence[Any]) -> dict[str, Tensor]:
    return {"sources": torch.tensor(sources), "targets": torch.tensor(targets)}
