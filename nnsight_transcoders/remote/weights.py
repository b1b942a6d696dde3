"""Weights of a model that is elsewhere: norms from its server, projections from its checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnsight_transcoders.circuits.attention_weights import Linear, stored_weight
from nnsight_transcoders.errors import CheckpointError, SiteError
from nnsight_transcoders.hub.hub_snapshot import open_snapshot
from nnsight_transcoders.hub.snapshot import Snapshot
from nnsight_transcoders.models import has_weights
from nnsight_transcoders.norms import TOLERANCE, NormSpec, spec_of_probe
from nnsight_transcoders.sites import Sites

logger = logging.getLogger(__name__)


def norm_requests(module: nn.Module, sites: Sites) -> list[dict[str, Any]]:
    """What ``norm_probe.probe_norm`` is told of each norm on the residual path."""
    paths = dict.fromkeys(
        path
        for layer in sites.layers
        for path in (
            layer.attention_norm,
            layer.attention_post_norm,
            layer.mlp_norm,
            layer.mlp_post_norm,
        )
        if path is not None
    )
    paths[sites.final_norm] = None
    return [
        {"path": path, "width": sites.d_model, "eps": epsilons(module.get_submodule(path))}
        for path in paths
    ]


def epsilons(norm: nn.Module) -> list[float]:
    """What a norm's epsilon may be."""
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    return [0.0, 1e-6, 1e-5] if eps is None else [float(eps)]


class RemoteWeights:
    """``ModelWeights`` of a remote model.

    Args:
        module: Its module tree; no weights are needed.
        norms: Path -> what ``probe_norm`` found.
        checkpoint: Where its projections can be read; None if they are not.
    """

    def __init__(
        self,
        module: nn.Module,
        norms: Mapping[str, Mapping[str, Any]],
        checkpoint: Checkpoint | None,
    ) -> None:
        self._module, self._norms, self._checkpoint = module, norms, checkpoint

    def norm(self, path: str, x: Tensor) -> NormSpec:
        """See ``ModelWeights.norm``; the comparison was made where the model is.

        Raises:
            SiteError: It is neither a LayerNorm nor an RMSNorm.
        """
        kind = type(self._module.get_submodule(path)).__name__
        return spec_of_probe(f"{path} ({kind})", self._norms[path], TOLERANCE[x.dtype])

    def linear(self, path: str, width: int, dtype: torch.dtype) -> Linear:
        """See ``ModelWeights.linear``; stored weights need not be told their width."""
        del width
        if self._checkpoint is not None:
            return self._checkpoint.linear(self._module, path, dtype)
        stored = stored_weight(self._module.get_submodule(path), dtype)
        if stored is None:
            raise SiteError(f"the weights of {path} are not at hand: the model is remote")
        return stored


class Checkpoint:
    """The tensors of a Hugging Face checkpoint, each read when it is asked for, and nothing else.

    Args:
        snapshot: A folder or Hub repository with safetensors files.

    Raises:
        CheckpointError: It has none.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot, self.where = snapshot, snapshot.where
        index = [name for name in snapshot.files if name.endswith(".safetensors.index.json")]
        if index:
            self._files: dict[str, str] = snapshot.json(index[0])["weight_map"]
            return
        names = [name for name in snapshot.files if name.endswith(".safetensors")]
        if not names:
            raise CheckpointError(
                f"{snapshot.where} has no safetensors file with the model's weights; it has "
                f"{snapshot.listing()}"
            )
        headers = snapshot.headers(names)
        self._files = {key: name for name, header in headers.items() for key in header}

    @classmethod
    def of(cls, model: Any, weights: str | Path | None) -> Checkpoint | None:
        """The checkpoint named by ``weights``, or the folder that the model was made from; None
        where there is none.

        Raises:
            CheckpointError: ``weights`` names one that cannot be read.
        """
        if weights is not None:
            return cls(open_snapshot(str(weights)))
        folder = str(getattr(model, "repo_id", None) or "")
        if not Path(folder).is_dir():
            return None
        try:
            return cls(open_snapshot(folder))
        except CheckpointError as error:
            logger.info("the model's folder cannot be read for its weights: %s", error)
            return None

    def linear(self, module: nn.Module, path: str, dtype: torch.dtype) -> Linear:
        """The weight and bias of a linear module, the way round ``nn.Linear`` has them.

        Raises:
            SiteError: The checkpoint has no such tensor, or one of another shape.
        """
        expected: Any = module.get_submodule(path)
        names = self._candidates(module, path)
        weight = self._tensor([f"{name}.weight" for name in names])
        if weight is None or weight.shape != expected.weight.shape:
            found = "nothing" if weight is None else f"shape {tuple(weight.shape)}"
            raise SiteError(
                f"{self.where} has {found} for {path}.weight, expected shape "
                f"{tuple(expected.weight.shape)}: it is not this model's checkpoint, or stores "
                "its weights differently. Leave weights= out"
            )
        bias = None
        if getattr(expected, "bias", None) is not None:
            bias = self._tensor([f"{name}.bias" for name in names])
        weight = weight.to(dtype)
        if type(expected).__name__ == "Conv1D":
            weight = weight.T
        return weight, None if bias is None else bias.to(dtype)

    def _candidates(self, module: nn.Module, path: str) -> list[str]:
        """Names a module's tensors may have: with or without the body's prefix, or those of the
        embedding where the unembedding is the same tensor."""
        prefix = f"{getattr(module, 'base_model_prefix', '')}."
        names = [path, path.removeprefix(prefix)]
        owner: Any = module
        embed, unembed = owner.get_input_embeddings(), owner.get_output_embeddings()
        tied = getattr(getattr(module, "config", None), "tie_word_embeddings", False)
        if tied and unembed is module.get_submodule(path):
            paths = {id(child): name for name, child in module.named_modules()}
            names += [paths[id(embed)], paths[id(embed)].removeprefix(prefix)]
        return names

    def _tensor(self, names: Sequence[str]) -> Tensor | None:
        for name in names:
            if name in self._files:
                return self._snapshot.tensor(self._files[name], name)
        return None


def projections(
    model: Any, module: nn.Module, weights: str | Path | None
) -> tuple[Checkpoint | None, str | None]:
    """Where the client can read a remote model's projections.

    Args:
        model: The nnsight model.
        module: Its module tree.
        weights: A folder or Hub repository; ``"auto"`` or None for the module or the folder that
            the model was made from; ``"server"`` for nowhere.

    Returns:
        The checkpoint to read them from (None where the module holds them), and where that is in
        words; ``(None, None)`` if the client cannot read them.
    """
    if weights == "server":
        return None, None
    weights = None if weights == "auto" else weights
    if weights is None and has_weights(module):
        return None, "the model's own module"
    checkpoint = Checkpoint.of(model, weights)
    return checkpoint, None if checkpoint is None else checkpoint.where
