"""What a failed job says, read for the user: the server's traceback, and which of it is ours."""

from __future__ import annotations

import re

from nnsight_transcoders.errors import JobFailedError, RemoteError, VersionMismatchError

_OURS = re.compile(r'File "(nnsight_transcoders/[\w/]+\.py)", line (\d+), in (\w+)')
# How ndif 0.1.2 words a request that it could not rebuild (ndif.common.errors).
_DIFFERENT = ("architecture on this server doesn't match", "payload could not be read")


def job_error(text: str, job_id: str, host: str) -> RemoteError:
    """The error of a job that ended in one.

    Args:
        text: What the server said: a sentence, or a traceback.
        job_id: The job's id.
        host: The server.
    """
    text = text.strip()
    if any(words in text for words in _DIFFERENT):
        error: RemoteError = VersionMismatchError(
            f"the server {host} could not rebuild the request: {text}\n"
            "Compare the two environments with nnsight.compare()"
        )
    else:
        error = JobFailedError(f"job {job_id} failed on {host}: {_summary(text)}\n\n{text}")
    error.job_id = job_id
    return error


def _summary(text: str) -> str:
    """The last line of a traceback, and the last of our frames in it."""
    last = text.splitlines()[-1] if text else "no reason was given"
    frames = _OURS.findall(text)
    if not frames:
        return last
    path, line, function = frames[-1]
    return f"{last} (raised in this package's {path}, line {line}, in {function})"
