"""A process that serves traced blocks as an NDIF server does, over pipes, without this package.

``remote="local"`` deserialises a request and then runs the *original* block and model. Here what
was deserialised runs, in a process where importing ``nnsight_transcoders`` fails, on a model that
was loaded there: the in-process way of ndif 0.1.2 (rebuild the tracer against the live model,
execute its code, return what was saved). The real server, and its sandbox, are in ``tests/ndif``.
"""

from __future__ import annotations

import io
import linecache
import pickle
import struct
import subprocess
import sys
import traceback
from typing import Any, BinaryIO

import torch
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from nnsight.tracing.globals import BLOCKS, SOURCES
from nnsight.tracing.tracer import _saves, dec, inc, save
from nnsight.tracing.util import push

PACKAGE = "nnsight_transcoders"


class ServerError(Exception):
    """The block failed on the server; the message is its traceback there."""


class Absent:
    """A finder that makes the package unimportable."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"No module named {name!r} on the server")


def read(stream: BinaryIO) -> Any:
    """One message; EOFError at the end."""
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    return pickle.loads(stream.read(struct.unpack(">q", head)[0]))


def write(stream: BinaryIO, value: Any) -> None:
    """Send one message."""
    data = pickle.dumps(value)
    stream.write(struct.pack(">q", len(data)) + data)
    stream.flush()


class ServedModel:
    """A server process with one model, and its client's side.

    Args:
        folder: Where the model is.
        dtype: In which it is loaded there.
    """

    def __init__(self, folder: str, dtype: str = "float32") -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, folder, dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.sent: list[int] = []
        assert read(self._out) == "ready"

    @property
    def _out(self) -> BinaryIO:
        assert self.process.stdout is not None
        return self.process.stdout  # type: ignore[return-value]

    def backend(self) -> ServedBackend:
        """For ``model.trace(..., backend=...)``; one per trace."""
        return ServedBackend(self)

    def run(self, blob: bytes) -> dict[str, Any]:
        """Run a request; its saved values."""
        self.sent.append(len(blob))
        assert self.process.stdin is not None
        write(self.process.stdin, blob)  # type: ignore[arg-type]
        kind, value = read(self._out)
        if kind == "error":
            raise ServerError(value)
        return torch.load(io.BytesIO(value), weights_only=False)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


class ServedBackend(Backend):
    """nnsight's remote backend in all but the transport."""

    def __init__(self, server: ServedModel) -> None:
        self.server = server

    def __call__(self, tracer: Any) -> None:
        values = self.server.run(RequestModel.serialize(tracer))
        for value in values.values():
            save(value)
        push(tracer.info.frame, values)


class RestoredBackend(Backend):
    """The same in this process: for models that no other process has.

    Args:
        model: What the server would have.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, tracer: Any) -> None:
        kind, value = answer(self.model, RequestModel.serialize(tracer))
        if kind == "error":
            raise ServerError(value)
        values = torch.load(io.BytesIO(value), weights_only=False)
        for one in values.values():
            save(one)
        push(tracer.info.frame, values)


def serve(folder: str, dtype: str) -> None:
    """The server's side."""
    sys.meta_path.insert(0, Absent())  # type: ignore[arg-type]
    import nnsight

    answers = sys.stdout.buffer
    sys.stdout = sys.stderr
    model = nnsight.TransformersModel(
        folder, task="text-generation", dispatch=True, dtype=getattr(torch, dtype)
    )
    model._module.requires_grad_(False)
    write(answers, "ready")
    while True:
        try:
            blob = read(sys.stdin.buffer)
        except EOFError:
            return
        write(answers, answer(model, blob))


def answer(model: Any, blob: bytes) -> tuple[str, Any]:
    """Run a request on a model: ``("saved", values)`` or ``("error", traceback)``."""
    # What nnsight remembers of a file's source is from another request's part of it.
    before = [(cache, dict(cache)) for cache in (linecache.cache, SOURCES, BLOCKS)]
    inc()
    try:
        tracer = RequestModel.deserialize(blob, model._remoteable_persistent_objects())
        tracer.execute(tracer.info.code)
        kept = _saves()
        saved = {k: v for k, v in tracer.info.frame.f_locals.items() if id(v) in kept}
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        return "saved", buffer.getvalue()
    except Exception:
        return "error", traceback.format_exc()
    finally:
        dec()
        for cache, content in before:
            cache.clear()
            cache.update(content)


if __name__ == "__main__":
    serve(*sys.argv[1:])
