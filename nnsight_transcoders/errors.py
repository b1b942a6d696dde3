"""The package's exceptions: one base class, so that a caller can catch ours and nothing else.

Every message says what is wrong, which input it was, and how to mend it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any


class TranscoderError(Exception):
    """Base class of every error this package raises on purpose."""


class ConfigError(TranscoderError):
    """A configuration value is unknown, missing, or contradicts another one."""


class CheckpointError(TranscoderError):
    """A checkpoint cannot be read: missing, malformed, of the wrong shape, or unsafe."""


class SiteError(TranscoderError):
    """A part of the model (block, norm, attention, site) is missing or not as expected."""


class MismatchError(TranscoderError):
    """A transcoder set does not fit the model it is used with."""


class InputError(TranscoderError):
    """A prompt, token, position, feature or path given by the caller cannot be used."""


class TrainingError(TranscoderError):
    """Training cannot go on: the loss is not finite, say. The last checkpoint is kept."""


class EndpointError(TranscoderError):
    """A language model's endpoint cannot be reached or gave no usable answer."""


class RemoteError(TranscoderError):
    """A request to an NDIF server did not come back with its result.

    Attributes:
        job_id: The job's id on the server, where there is one already.
        graph: From ``attribute(..., remote=...)``: the unfinished graph. It keeps what was already
            received; ``error.graph.result()`` goes on from there.
    """

    job_id: str | None = None
    graph: Any = None


class ServerUnreachableError(RemoteError):
    """The server does not answer, or said that it cannot serve at the moment.

    Attributes:
        safe_to_repeat: Whether nothing can have been done yet, so that trying again does it once.
    """

    safe_to_repeat: bool = False


class RequestRejectedError(RemoteError):
    """The server refused a request: the key, the model, or what is in it."""


class PayloadTooLargeError(RemoteError):
    """A request or its result would be larger than the bound that was set, or than the server
    accepts."""


class JobFailedError(RemoteError):
    """A job raised an error on the server; the message holds the server's traceback."""


class JobPendingError(RemoteError):
    """A job did not end within the time that was given; it goes on, and can be waited for again."""


class JobLostError(RemoteError):
    """The server does not know a job any more, most often since it was restarted."""


class VersionMismatchError(RemoteError):
    """The packages here and on the server do not fit together."""


class UploadError(TranscoderError):
    """A service that files are uploaded to refused, did not answer, or answered something else."""
