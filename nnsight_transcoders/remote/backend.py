"""One remote job: nnsight's own request, bounded, with errors that say what to do.

Jobs are always sent without a websocket: the server then stores their status and result, so that a
lost connection, or a client that was restarted, can still fetch them by the job's id.
"""

from __future__ import annotations

import logging
from typing import Any

import httpx
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.intervention.backends.remote import RemoteError as NNsightRemoteError
from nnsight.schema.response import ResponseModel, Status

from nnsight_transcoders.errors import (
    CheckpointError,
    PayloadTooLargeError,
    RemoteError,
    RequestRejectedError,
    ServerUnreachableError,
    VersionMismatchError,
)
from nnsight_transcoders.hub.hub_errors import hub_errors

from .failures import job_error
from .payload import megabytes
from .retry import retrying
from .server import RemoteServer

logger = logging.getLogger(__name__)

_UNAVAILABLE = (429, 502, 503, 504)


class JobBackend(RemoteBackend):
    """nnsight's non-blocking remote backend with a bound on the request's size, retries where
    nothing can be done twice, and this package's errors.

    Args:
        server: Where to, and the bounds.
        model: The model that the request names; None to fetch a job that was sent before.
        job_id: Of a job that was sent before.
    """

    def __init__(self, server: RemoteServer, model: Any = None, job_id: str | None = None) -> None:
        super().__init__(
            "" if model is None else _model_key(model),
            host=server.host,
            env=None if model is None else model._remoteable_get_env(),
            blocking=False,
            job_id=job_id,
        )
        self.server = server
        self.sent_bytes = self.received_bytes = 0

    def _serialize(self, tracer: Any) -> bytes:
        blob = super()._serialize(tracer)
        self.sent_bytes = len(blob)
        logger.info("sending %s to %s", megabytes(len(blob)), self.host)
        if len(blob) > self.server.max_bytes:
            raise PayloadTooLargeError(
                f"the request has {megabytes(len(blob))}, more than max_bytes = "
                f"{megabytes(self.server.max_bytes)}: raise it with RemoteServer(max_bytes=...), "
                "or ask for less (a shorter prompt, fewer max_feature_nodes, fewer layers)"
            )
        return blob

    def _post(self, request: Any, blob: bytes) -> ResponseModel:
        # A request that was refused or never arrived has not been queued: sending it again is
        # safe. One that was cut off while under way may have been, and is not repeated.
        send = super()._post

        def once() -> ResponseModel:
            try:
                return send(request, blob)
            except NNsightRemoteError as error:
                raise _sending_error(error, self.host) from error

        return retrying(once, self.server.patience)

    def fetch(self) -> ResponseModel | None:
        """The job's latest status; None before the server has stored one.

        Raises:
            ServerUnreachableError: It does not answer for longer than ``patience``.
        """
        headers = {"ndif-api-key": self.api_key} if self.api_key else None

        def once() -> ResponseModel | None:
            try:
                answer = httpx.get(
                    f"{self.host}/response/{self.job_id}", headers=headers, timeout=60.0
                )
                if answer.status_code == 404:
                    return None
                answer.raise_for_status()
            except httpx.HTTPError as error:
                raise _waiting_error(error, self.host, self.job_id) from error
            return ResponseModel.model_validate_json(answer.text)

        response = retrying(once, self.server.patience)
        if response is not None:
            self.status = response.status
            self.display.update(response)
            if response.status == Status.ERROR:
                raise job_error(response.description, str(self.job_id), self.host)
        return response

    def download(self, url: Any) -> Any:
        """The saved values of a completed job."""

        def once() -> Any:
            try:
                return self.download_result(url)
            except httpx.HTTPError as error:
                raise _waiting_error(error, self.host, self.job_id) from error

        return retrying(once, self.server.patience)

    def finalize(self, content: bytes) -> Any:
        """Count what came back, then load it."""
        self.received_bytes = len(content)
        logger.info("received %s from %s", megabytes(len(content)), self.host)
        return super().finalize(content)


def _model_key(model: Any) -> str:
    """What the server knows the model by; nnsight asks the Hub for its full name.

    Raises:
        ServerUnreachableError: The Hub does not answer.
    """
    try:
        with hub_errors(str(model.repo_id)):
            return model.to_model_key()
    except CheckpointError as error:
        raise ServerUnreachableError(
            f"the model's name could not be looked up on the Hub: {error}"
        ) from error


def _sending_error(error: NNsightRemoteError, host: str) -> RemoteError:
    """What it means that a request could not be sent."""
    cause, text = error.__cause__, str(error).removeprefix("Failed to send request: ")
    if not isinstance(cause, httpx.HTTPStatusError):
        unsent = isinstance(cause, (httpx.ConnectError, httpx.ConnectTimeout))
        found = ServerUnreachableError(
            f"the server {host} does not answer: {text}. Is it running, and is this its address?"
            + ("" if unsent else " The request may have arrived; sending it again is safe.")
        )
        found.safe_to_repeat = unsent
        return found
    code = cause.response.status_code
    if code in _UNAVAILABLE:
        found = ServerUnreachableError(f"the server {host} cannot serve at the moment: {text}")
        found.safe_to_repeat = True
        return found
    if code == 413:
        return PayloadTooLargeError(
            f"the server {host} takes no request of this size: {text}. Ask for less (a shorter "
            "prompt, fewer max_feature_nodes, fewer layers)"
        )
    if code == 400 and "version" in text:
        return VersionMismatchError(f"the server {host} refuses this client: {text}")
    if code in (401, 403):
        return RequestRejectedError(
            f"the server {host} refuses the request ({code}): {text}. Set your key with "
            "nnsight.login() or NDIF_API_KEY"
        )
    return RequestRejectedError(f"the server {host} refuses the request ({code}): {text}")


def _waiting_error(error: httpx.HTTPError, host: str, job_id: str | None) -> RemoteError:
    """What it means that a job's status or result could not be fetched."""
    if isinstance(error, httpx.HTTPStatusError) and (
        error.response.status_code not in _UNAVAILABLE and error.response.status_code < 500
    ):
        found: RemoteError = RequestRejectedError(
            f"the server {host} does not hand out job {job_id}: {error}"
        )
    else:
        found = ServerUnreachableError(
            f"lost the connection to {host} while waiting for job {job_id}: {error}. The job goes "
            "on there; ask for its result again when the server answers"
        )
        found.safe_to_repeat = True
    found.job_id = job_id
    return found
