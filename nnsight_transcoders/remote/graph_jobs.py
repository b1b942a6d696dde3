"""The jobs of one remote graph: sent once, waited for, taken up again, sent anew when lost."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nnsight_transcoders.circuits.collect import eager_attention
from nnsight_transcoders.errors import (
    JobLostError,
    JobPendingError,
    RemoteError,
    ServerUnreachableError,
)

from .calls import Job, submit
from .keeping import Kept
from .server import RemoteServer

logger = logging.getLogger(__name__)


class GraphJobs:
    """At most one job for each phase of a graph.

    Args:
        model: The model that requests name.
        module: Its module tree.
        server: Where to.
        kept: Where job ids are kept.

    Attributes:
        n_requests: Requests sent by this object.
        sent_bytes: Their size together.
        received_bytes: That of their answers.
    """

    def __init__(self, model: Any, module: nn.Module, server: RemoteServer, kept: Kept) -> None:
        self._model, self._module, self._server, self._kept = model, module, server, kept
        self._jobs: dict[str, Job] = {}
        self.n_requests = self.sent_bytes = self.received_bytes = 0

    def send(self, phase: str, ids: Tensor, function: Callable[..., Any], *args: Any) -> Job:
        """Send a phase's request, unless its job is under way."""
        if phase in self._kept.jobs:
            return self.job(phase)
        # The client's setting travels with the request: the server runs it in eager attention,
        # which alone hands out the pattern.
        with eager_attention(self._module):
            job = submit(self._model, ids, function, *args, remote=self._server, use_cache=False)
        self.n_requests += 1
        self.sent_bytes += job.sent_bytes
        self._jobs[phase] = job
        self._kept.set_job(phase, job.job_id)
        return job

    def job(self, phase: str) -> Job:
        """The job that a phase waits for, perhaps sent by another process."""
        if phase not in self._jobs:
            self._jobs[phase] = Job.resume(self._kept.jobs[phase], self._server)
        return self._jobs[phase]

    def wait(self, phase: str, send: Callable[[], Job], timeout: float | None) -> Any:
        """A job's result. One that the server lost is sent once more at once; one that failed is
        sent anew by the next call."""
        job = send()
        try:
            answer = job.result(timeout)
        except JobLostError as error:
            logger.info("%s Sending it again.", error)
            self.forget(phase)
            job = send()
            answer = job.result(timeout)
        except (ServerUnreachableError, JobPendingError):
            raise
        except RemoteError:
            self.forget(phase)
            raise
        self.received_bytes += job.received_bytes
        self.forget(phase)
        return answer

    def forget(self, phase: str) -> None:
        """Do not wait for a phase's job any more."""
        self._jobs.pop(phase, None)
        self._kept.set_job(phase, None)
