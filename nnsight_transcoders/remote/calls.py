"""Run one of this package's functions inside a trace, here or on a server.

Everything remote in this package goes through ``call`` or ``submit``: a module-level function of
a torch-only module gets the model (its values and modules as nnsight serves them) and plain data,
and what it returns comes back. The same function serves a local model, so that there is one
implementation of everything that reads a run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from nnsight.intervention.backends.local import LocalSimulationBackend
from nnsight.schema.response import Status

from nnsight_transcoders.errors import JobLostError, JobPendingError

from .backend import JobBackend
from .loader import run_shipped
from .retry import pauses
from .server import Remote, RemoteServer, check_remote_model, remote_server
from .shipping import entry_of, loader_by_value, shipped_sources

#: Seconds after which a job that the server never mentioned counts as lost.
UNKNOWN_AFTER = 60.0


@dataclass(frozen=True)
class Step:
    """One of the runs that a request asks for.

    Attributes:
        inputs: What to trace: token ids ``(batch, T)``.
        function: What runs inside that trace: see ``call``.
        args: Plain data for it.
    """

    inputs: Any
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()


class Job:
    """A request that was sent.

    Attributes:
        job_id: Its id on the server; None where it was run at once.
        sent_bytes: Size of the request; 0 for a job of an earlier session.
        received_bytes: Size of the result, once it is here.
    """

    def __init__(self, backend: JobBackend | None, value: Any = None) -> None:
        self._backend, self._value = backend, value
        self._done, self._seen = backend is None, False
        self.job_id = None if backend is None else backend.job_id
        self.sent_bytes = 0 if backend is None else backend.sent_bytes
        self.received_bytes = 0

    @classmethod
    def resume(cls, job_id: str, remote: Remote) -> Job:
        """The job of that id, perhaps sent by an earlier session of this client."""
        server = remote_server(remote) or RemoteServer()
        return cls(JobBackend(server, job_id=job_id))

    def status(self) -> str:
        """``"COMPLETED"``, or what the server said last.

        Raises:
            JobFailedError: It ended in an error.
            ServerUnreachableError: The server does not answer.
        """
        return "COMPLETED" if self._done else self._poll()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the result; it may be asked for again after any error.

        Args:
            timeout: Seconds to wait; default: the server settings'.

        Raises:
            JobPendingError: It has not ended in that time, and goes on.
            JobFailedError: It ended in an error.
            JobLostError: The server does not know it (any more).
            ServerUnreachableError: The server does not answer.
        """
        if self._done or self._backend is None:
            return self._value
        timeout = self._backend.server.timeout if timeout is None else timeout
        started = time.monotonic()
        for pause in pauses(0.05, 2.0):
            status, waited = self._poll(), time.monotonic() - started
            if self._done:
                return self._value
            if status == "UNKNOWN" and (self._seen or waited > UNKNOWN_AFTER):
                raise self._error(
                    JobLostError,
                    "is not known there (any more): the server was restarted, or the id belongs "
                    "to another one. Send the request again",
                )
            if timeout is not None and waited + pause > timeout:
                raise self._error(
                    JobPendingError,
                    f"has not ended after {timeout:g} s (last status: {status}). It goes on; ask "
                    "for its result again",
                )
            time.sleep(pause)
        raise AssertionError("pauses() does not end")

    def _error(self, kind: type[Any], text: str) -> Any:
        assert self._backend is not None
        error = kind(f"job {self.job_id} on {self._backend.host} {text}")
        error.job_id = self.job_id
        return error

    def _poll(self) -> str:
        assert self._backend is not None
        response = self._backend.fetch()
        if response is None:
            return "UNKNOWN"
        self._seen = True
        if response.status == Status.COMPLETED:
            self._value = self._backend.download(response.data)["result"]
            self._done, self.received_bytes = True, self._backend.received_bytes
        return response.status.value


def call(
    model: Any,
    inputs: Any,
    function: Callable[..., Any],
    *args: Any,
    remote: Remote | None = None,
    stop: bool = False,
    **options: Any,
) -> Any:
    """Run ``function(model, *args)`` inside a trace of ``model`` and return its result.

    Args:
        model: An nnsight model; for a remote call its weights are not needed.
        inputs: What to trace: token ids ``(batch, T)``.
        function: A module-level function of a module that imports torch only.
        *args: Plain data for it: tensors, numbers, strings, lists, tuples, dicts.
        remote: False, True, ``"local"``, an address, or a ``RemoteServer``.
        stop: The model need not run on when the function is done.
        **options: Further arguments of ``model.trace``.
    """
    return submit(model, inputs, function, *args, remote=remote, stop=stop, **options).result()


def submit(
    model: Any,
    inputs: Any,
    function: Callable[..., Any],
    *args: Any,
    remote: Remote | None = None,
    stop: bool = False,
    **options: Any,
) -> Job:
    """Like ``call``, without waiting for the result."""
    server = remote_server(remote)
    if server is None:
        return Job(None, _here(model, inputs, function, args, options, stop))
    sources, entry = shipped_sources(function), entry_of(function)
    return _sent(
        model, server, lambda to: _shipped(model, inputs, sources, entry, args, options, to, stop)
    )


def submit_steps(model: Any, steps: Sequence[Step], server: RemoteServer, **options: Any) -> Job:
    """Send several runs as one request, an nnsight session. Its result is the list of theirs.

    Args:
        model: See ``call``.
        steps: The runs, each in a trace of its own.
        server: Where to.
        **options: Further arguments of every ``model.trace``.
    """
    sources: dict[str, str] = {}
    for function in {step.function: None for step in steps}:
        sources |= shipped_sources(function)
    runs = [(step.inputs, entry_of(step.function), step.args) for step in steps]
    return _sent(model, server, lambda to: _shipped_session(model, runs, sources, options, to))


def _sent(model: Any, server: RemoteServer, block: Callable[[Any], Any]) -> Job:
    """Give a traced block to the backend that sends it, or rehearses it here."""
    check_remote_model(model)
    with loader_by_value(), torch.no_grad():
        if server.local:
            return Job(None, block(LocalSimulationBackend(model)))
        backend = JobBackend(server, model)
        block(backend)
        return Job(backend)


def _here(
    model: Any,
    inputs: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    options: Any,
    stop: bool,
) -> Any:
    # nnsight reads this block as source: it runs inside the forward pass.
    with model.trace(inputs, **options) as tracer:
        result = nnsight.save(function(model, *args))
        if stop:
            tracer.stop()
    return result  # noqa: RET504 - nnsight fills it in


def _shipped(
    model: Any,
    inputs: Any,
    sources: dict[str, str],
    entry: str,
    args: tuple[Any, ...],
    options: Mapping[str, Any],
    backend: Any,
    stop: bool,
) -> Any:
    # This block travels: what it names is all that the server gets.
    result = None
    with model.trace(inputs, backend=backend, **options) as tracer:
        result = nnsight.save(run_shipped(sources, entry, (model, *args)))
        if stop:
            tracer.stop()
    return result  # noqa: RET504 - nnsight fills it in


def _shipped_session(
    model: Any,
    runs: list[tuple[Any, str, tuple[Any, ...]]],
    sources: dict[str, str],
    options: Mapping[str, Any],
    backend: Any,
) -> Any:
    # As above, for several traces.
    result = None
    with model.session(backend=backend):
        result = nnsight.save([])
        for inputs, entry, args in runs:
            with model.trace(inputs, **options):
                result.append(run_shipped(sources, entry, (model, *args)))
    return result  # noqa: RET504 - nnsight fills it in
