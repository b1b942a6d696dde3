"""One batch of text through a model and its replaced variants, here or on a server.

Each function is one nnsight session, so it is one request where the model is remote: the token ids
and the attached transcoders' weights go there, and sums come back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import nnsight
import torch
from nnsight.intervention.backends.local import LocalSimulationBackend
from torch import Tensor

from nnsight_transcoders.remote.backend import JobBackend
from nnsight_transcoders.remote.calls import Job
from nnsight_transcoders.remote.loader import run_shipped
from nnsight_transcoders.remote.server import Remote, check_remote_model, remote_server
from nnsight_transcoders.remote.shipping import entry_of, loader_by_value, shipped_sources

from .batch_sums import layer_statistics, prediction_sums
from .token_batches import TokenBatch
from .variants import Variant


class BatchRuns:
    """Runs batches through a model.

    Args:
        model: An nnsight model.
        remote: Where it runs (see ``remote.server.Remote``).
    """

    def __init__(self, model: Any, remote: Remote | None = None) -> None:
        self._model, self._server = model, remote_server(remote)
        if self._server is not None:
            check_remote_model(model)

    def statistics(self, watched: Any, layers: Sequence[int], batch: TokenBatch) -> list[tuple]:
        """Per layer ``layer_statistics`` of an attached model (mode ``"observe"``)."""
        args = (watched, list(layers), batch.inputs(), batch.measured)
        return self._run(_statistics, self._there(layer_statistics), *args)

    def predictions(
        self, variants: Sequence[tuple[Variant, Any]], batch: TokenBatch
    ) -> list[Tensor]:
        """``prediction_sums`` of the model itself and of every variant (each with its edited
        model), in that order."""
        edited = [(one, variant.isolated, variant.start) for variant, one in variants]
        args = (self._model, edited, batch.inputs(), batch.ids, batch.predicted)
        return self._run(_predictions, self._there(prediction_sums), *args)

    def _there(self, function: Callable[..., Any]) -> Callable[[tuple], Any]:
        """A function of ours as something that can be called where the model is."""
        if self._server is None:
            return lambda args: function(*args)
        return partial(run_shipped, shipped_sources(function), entry_of(function))

    def _run(self, session: Callable[..., Any], *args: Any) -> Any:
        with torch.no_grad():
            if self._server is None:
                return session(None, *args)
            with loader_by_value():
                if self._server.local:
                    return session(LocalSimulationBackend(self._model), *args)
                backend = JobBackend(self._server, self._model)
                session(backend, *args)
        return Job(backend).result()


# nnsight reads these functions' blocks as source: they run inside forward passes, perhaps on a
# server, which gets what they name and nothing else.


def _statistics(
    backend: Any,
    measure: Callable[[tuple], Any],
    watched: Any,
    layers: list[int],
    inputs: dict[str, Tensor],
    where: Tensor,
) -> list[tuple]:
    result: list[tuple] = []
    with watched.session(backend=backend):
        result = nnsight.save([])
        with watched.trace(**inputs):
            for layer in layers:
                node = watched.transcoders[layer]
                features = node.features.output
                reconstruction = node.reconstruction.output
                error = node.error.output
                result.append(measure((features, reconstruction, error, where)))
    return result


def _predictions(
    backend: Any,
    measure: Callable[[tuple], Any],
    model: Any,
    edited: list[tuple[Any, int | None, int]],
    inputs: dict[str, Tensor],
    ids: Tensor,
    where: Tensor,
) -> list[Tensor]:
    result: list[Tensor] = []
    with model.session(backend=backend):
        result = nnsight.save([])
        with model.trace(**inputs):
            own = model.output.logits
            result.append(measure((own, own, ids, where)))
        for replaced, isolated, start in edited:
            with replaced.trace(**inputs):
                if isolated is not None:
                    node = replaced.transcoders[isolated]
                    inside = node.token_index.output >= start
                    error = node.error.output
                    node.error.output = error.masked_fill(inside[..., None], 0)
                logits = replaced.output.logits
                result.append(measure((logits, own, ids, where)))
    return result
