"""What NDIF 0.1.2 needs to serve a model without a GPU, and with the nnsight that is on PyPI.

Imported by the server's own processes, in an environment that lacks this package. These are
subclasses in the places where NDIF lets its operator name a class; the way of a request (queue,
deserialising, interleaving, sandbox, answer) is NDIF's own code.
"""

from __future__ import annotations

import gc
import os
from typing import Any

import ray
from ndif.services.ray.deployments.controller.cluster.evaluator import CacheEntry, ModelEvaluator
from ndif.services.ray.deployments.controller.controller import _ControllerActor
from ndif.services.ray.deployments.modeling.base import BaseModelDeployment
from ndif.services.ray.sandbox.host import Pool, Sandbox, spawn
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel
from nnsight.modeling.mixins.remotable import Remotable

# A process that imports torch and nnsight can take this long on a busy machine; NDIF allows 30 s.
_RUNNER_START_SECONDS = 300.0


class _Evaluator(ModelEvaluator):
    """Sizes a model; NDIF 0.1.2 passes an argument here that nnsight 0.8.1 does not know."""

    def _entry(self, model_key: str, dtype: Any, trust_remote_code: bool) -> CacheEntry:
        if model_key not in self.cache:
            about = Remotable.describe_checkpoint(model_key, str(dtype))
            self.cache[model_key] = CacheEntry(
                about.size_bytes,
                about.n_params,
                about.config,
                about.revision,
                str(dtype),
                trust_remote_code,
                None,
            )
        return self.cache[model_key]


class _Controller(_ControllerActor):
    """NDIF's controller with the evaluator above."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        theirs = self.cluster.evaluator
        self.cluster.evaluator = _Evaluator(theirs.padding_factor, theirs.padding_bias, None)


@ray.remote(num_cpus=1, num_gpus=0, max_restarts=-1, resources={"head": 1})
class Controller(_Controller):
    """The class that `NDIF_CONTROLLER_IMPORT_PATH` names."""


class _CPU(BaseModelDeployment):
    """A model on the CPU: loading, and the reclaiming after each request, without CUDA calls."""

    #: Never parked: the place that a parked model would make room on is the one it is in.
    CACHEABLE = False

    def load_from_disk(self) -> HuggingFaceModel:
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)  # as NDIF does: nothing may depend on gradients
        return model

    def cleanup(self) -> None:
        self.kill_switch.clear()
        self.kill_reason = None
        self.execution_ident = None
        self.model.interleaver.cancel()
        gc.collect()


class _Pool(Pool):
    """Runner processes with a longer start-up limit and their own command (see `server.py`)."""

    def _spawn(self) -> Sandbox:
        return spawn(
            python=os.environ["NDIF_TEST_RUNNER"],
            quiet=self.quiet,
            timeout=_RUNNER_START_SECONDS,
            peers=self.peers,
            model_key=self.model_key,
            trust_remote_code=self.trust_remote_code,
        )

    def acquire(self, timeout: float = _RUNNER_START_SECONDS) -> Sandbox:
        return super().acquire(timeout)


class _SandboxedCPU(SandboxModelDeployment, _CPU):
    """Trusted requests in the model's process, all others in a runner process."""

    def open_pool(self, pool_size: int | None = None, peers: int = 1) -> None:
        self.pool = _Pool(
            size=int(os.environ["NDIF_SANDBOX_POOL_SIZE"]) if pool_size is None else pool_size,
            peers=peers,
            model_key=self.model_key,
            trust_remote_code=self.kwargs.get("trust_remote_code", False),
        )
        self.execution_sandbox = None


@ray.remote(num_cpus=1, max_restarts=-1)
class ModelActor(_SandboxedCPU):
    """The class that `NDIF_DEFAULT_MODEL_ACTOR_CLASS` names."""
