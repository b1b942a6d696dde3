"""Shared by the tests of ``attach``: cached models and sets, traces, and an independent reference.

The reference knows nothing of the package's sites or edits: torch forward hooks on a second copy of
the Hugging Face module, at places named by the hand-written table of ``test_sites``, with the
transcoder's formula written out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import zoo
from test_sites import EXPECTED, expected_layer
from torch import Tensor, nn

from nnsight_transcoders.check import random_transcoders
from nnsight_transcoders.circuits.collect import Run, collect
from nnsight_transcoders.sets import TranscoderSet
from nnsight_transcoders.sites import resolve_sites
from nnsight_transcoders.transcoder import CrossLayerPart

IDS = torch.tensor([5, 9, 33, 12, 50, 7, 61])
PROMPT = "w5 w9 w33 w12 w50 w7 w61"
WIDTH = 24


@cache
def model(name: str) -> Any:
    """A tiny nnsight model, shared: leave it as it is."""
    return zoo.nnsight_model(name)


@cache
def run_of(name: str) -> Run:
    """One run of it on ``IDS``, for the scale of random transcoders."""
    return collect(model(name), resolve_sites(model(name)), IDS)


@cache
def transcoders(
    name: str,
    kind: str = "per-layer",
    input_site: str = "N1",
    output_site: str = "O",
    **config: Any,
) -> TranscoderSet:
    """A random set for it."""
    return random_transcoders(
        run_of(name),
        kind,  # type: ignore[arg-type]
        d_transcoder=WIDTH,
        input_site=input_site,
        output_site=output_site,
        **config,
    )


def logits_of(envoy: Any, ids: Tensor = IDS) -> Tensor:
    """Logits ``(pos, vocab)`` of one prompt."""
    with torch.no_grad(), envoy.trace(ids[None]):
        logits = envoy.output.logits.save()
    return logits[0]


@cache
def original_logits(name: str) -> Tensor:
    """Logits of the model as it is, from a copy that nnsight has never seen."""
    with torch.no_grad():
        return hf_copy(name)(IDS[None]).logits[0]


@cache
def hf_copy(name: str) -> nn.Module:
    """A copy of the Hugging Face module, for the reference; hooks on it do not stay."""
    return zoo.hf_model(name)


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """Site N0 of a residual value: torch's or Hugging Face's norm without its gain and bias."""
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, x.shape[-1:], eps=norm.eps)
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class Reference:
    """A copy of a model whose MLP outputs are replaced by hooks.

    Args:
        name: Which model of the zoo.
        chosen: The transcoders.
        features: Layer -> what to make of the feature activations ``(rows, features)`` before they
            are decoded.
        outputs: Layer -> what to write, given the MLP's own output and the reconstruction, both
            ``(rows, d_model)``. Default: the reconstruction.
    """

    def __init__(
        self,
        name: str,
        chosen: TranscoderSet,
        features: dict[int, Callable[[Tensor], Tensor]] | None = None,
        outputs: dict[int, Callable[[Tensor, Tensor], Tensor]] | None = None,
    ) -> None:
        self.module, self.expected, self.chosen = hf_copy(name), EXPECTED[name], chosen
        self.edit_features, self.edit_outputs = features or {}, outputs or {}
        self.x: dict[int, Tensor] = {}
        self.y: dict[int, Tensor] = {}
        self.features: dict[int, Tensor] = {}

    @classmethod
    def observing(cls, name: str, chosen: TranscoderSet) -> Reference:
        """One that has run the model on ``IDS`` as it is and kept the values at the sites."""
        found = cls(name, chosen, outputs=dict.fromkeys(chosen.layers, lambda y, _: y))
        found.output()
        return found

    def output(self, ids: Tensor = IDS, *, grad: bool = False, **kwargs: Any) -> Tensor:
        """Logits ``(batch, pos, vocab)`` with the MLPs of the set's layers replaced."""
        ids = ids[None] if ids.dim() == 1 else ids
        with self._hooked(), torch.set_grad_enabled(grad):
            return self.module(ids, **kwargs).logits

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        handles = []
        for layer in self.chosen.layers:
            here, config = expected_layer(self.expected, layer), self.chosen.config(layer)
            read, written = here.mlp_in, here.mlp_out
            if config.input_site != "N1":
                read = here.block if self.expected.parallel else here.mlp_norm or here.mlp_in
            if config.output_site == "O'":
                written = here.mlp_post_norm or written
            reader, writer = self._reader(layer, config.input_site), self._writer(layer)
            get = self.module.get_submodule
            handles.append(get(read).register_forward_pre_hook(reader, with_kwargs=True))
            handles.append(get(written).register_forward_hook(writer))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _reader(self, layer: int, site: str) -> Any:
        def read(_: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            x = x.reshape(-1, x.shape[-1]).clone()
            if site == "N0":
                norm = expected_layer(self.expected, layer).mlp_norm
                x = normalised(self.module.get_submodule(norm), x)
            self.x[layer] = x

        return read

    def _writer(self, layer: int) -> Any:
        def write(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            acts = self.edit_features.get(layer, lambda a: a)(self.encoded(layer))
            self.features[layer], self.y[layer] = acts, output.reshape(acts.shape[0], -1).clone()
            edit = self.edit_outputs.get(layer, lambda _, reconstruction: reconstruction)
            # A copy: Falcon adds to the MLP's output in place.
            return edit(self.y[layer], self.reconstruction(layer)).reshape(output.shape).clone()

        return write

    def encoded(self, layer: int) -> Tensor:
        """``relu(W_enc x + b_enc)`` of the value that the hook has read."""
        own = self.chosen[layer]
        return torch.relu(torch.einsum("nd,fd->nf", self.x[layer], own.W_enc) + own.b_enc)

    def reconstruction(self, layer: int) -> Tensor:
        """The transcoder's formula at the values that the hooks have read."""
        own = self.chosen[layer]
        out = own.b_dec.clone()
        if own.W_skip is not None:
            out = out + torch.einsum("nd,od->no", self.x[layer], own.W_skip)
        if not isinstance(own, CrossLayerPart):
            return out + self.features[layer] @ own.W_dec
        for source in self.chosen.layers:
            if source <= layer:
                part = self.chosen[source]
                assert isinstance(part, CrossLayerPart)
                out = out + self.features[source] @ part.W_dec[:, part.targets.index(layer)]
        return out
