"""The jobs of remote graphs: sent once, waited for, taken up again, sent anew when lost.

What several graphs ask for in the same phase is one request, within the bound on its size: each
graph's part is one step of it, and the answer is the list of theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from nnsight_transcoders.circuits.collect import eager_attention
from nnsight_transcoders.errors import (
    InputError,
    JobLostError,
    JobPendingError,
    RemoteError,
    ServerUnreachableError,
)

from .calls import Job, Step, submit_steps
from .keeping import Kept
from .payload import MARGIN, Payload
from .server import RemoteServer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """What one graph asks for in one phase.

    Attributes:
        step: The run and what is done in it.
        payload: About how much it sends and brings back.
    """

    step: Step
    payload: Payload


class Asking(Protocol):
    """A graph under way."""

    kept: Kept

    def part(self, phase: str) -> Part | None:
        """What it asks for in that phase; None for nothing (any more)."""
        ...

    def accept(self, phase: str, answer: Any) -> None:
        """Take what it asked for."""
        ...


class GraphJobs:
    """The jobs of one graph, or of several that are asked for together.

    Args:
        model: The model that requests name.
        module: Its module tree.
        server: Where to.

    Attributes:
        n_requests: Requests sent by this object.
        sent_bytes: Their size together.
        received_bytes: That of their answers.
    """

    def __init__(self, model: Any, module: nn.Module, server: RemoteServer) -> None:
        self._model, self._module, self._server = model, module, server
        self._under_way: dict[tuple[Kept, str], tuple[Job, int]] = {}
        self.n_requests = self.sent_bytes = self.received_bytes = 0

    def check_same(self, other: GraphJobs) -> None:
        """Check that requests of this object and of another one can be the same requests.

        Raises:
            InputError: They cannot.
        """
        if other._model is not self._model or other._server != self._server:
            raise InputError(
                "graphs that are asked for together must be of the same model object and the same "
                "server settings (remote=)"
            )

    def send(self, phase: str, graphs: Sequence[Asking]) -> None:
        """Send what graphs ask for, in as few requests as the bound allows; nothing for those
        whose job is under way."""
        together: list[tuple[Kept, Part]] = []
        for graph in graphs:
            if self.job(graph.kept, phase) is not None:
                continue
            part = graph.part(phase)
            if part is None:
                continue
            if together and not self._fits([*(p for _, p in together), part]):
                self._submit(phase, together)
                together = []
            together.append((graph.kept, part))
        if together:
            self._submit(phase, together)

    def fetch(self, phase: str, graphs: Sequence[Asking], timeout: float | None) -> None:
        """Bring each graph its answer. A job that the server lost is sent once more at once; one
        that failed is sent anew by the next call."""
        again = False
        while True:
            self.send(phase, graphs)
            try:
                for graph in graphs:
                    self._bring(phase, graph, timeout)
                return
            except JobLostError as error:
                if again:
                    raise
                again = True
                logger.info("%s Sending it again.", error)

    def job(self, kept: Kept, phase: str) -> Job | None:
        """The job that a graph's phase waits for, perhaps sent by another process."""
        if phase in kept.jobs and (kept, phase) not in self._under_way:
            job_id, number = kept.jobs[phase]
            known = (job for job, _ in self._under_way.values() if job.job_id == job_id)
            job = next(known, None) or Job.resume(job_id, self._server)
            self._under_way[kept, phase] = job, number
        job, _ = self._under_way.get((kept, phase), (None, 0))
        return job

    def forget(self, job: Job) -> None:
        """Do not wait for a job any more, whichever graphs are in it."""
        for kept, phase in [at for at, (other, _) in self._under_way.items() if other is job]:
            self._done(kept, phase)

    def _fits(self, parts: Sequence[Part]) -> bool:
        up = sum(part.payload.up for part in parts)
        down = sum(part.payload.down for part in parts)
        return MARGIN * max(up, down) <= self._server.max_bytes

    def _submit(self, phase: str, together: Sequence[tuple[Kept, Part]]) -> None:
        steps = [part.step for _, part in together]
        # The client's setting travels with the request: the server runs it in eager attention,
        # which alone hands out the pattern.
        with eager_attention(self._module):
            job = submit_steps(self._model, steps, self._server, use_cache=False)
        self.n_requests += 1
        self.sent_bytes += job.sent_bytes
        for number, (kept, _) in enumerate(together):
            self._under_way[kept, phase] = job, number
            kept.set_job(phase, job.job_id, number)

    def _bring(self, phase: str, graph: Asking, timeout: float | None) -> None:
        job = self.job(graph.kept, phase)
        if job is None:
            return
        _, number = self._under_way[graph.kept, phase]
        before = job.received_bytes
        try:
            answer = job.result(timeout)[number]
        except (ServerUnreachableError, JobPendingError):
            raise
        except RemoteError:
            self.forget(job)
            raise
        self.received_bytes += job.received_bytes - before
        graph.accept(phase, answer)
        self._done(graph.kept, phase)

    def _done(self, kept: Kept, phase: str) -> None:
        self._under_way.pop((kept, phase), None)
        kept.set_job(phase, None)
