"""The Hub client's errors as ``CheckpointError``, each with one line that says what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # httpx's own: the base class of refused connections and timeouts
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    SafetensorsParsingError,
)

from nnsight_transcoders.errors import CheckpointError

_HUB_ERRORS = (
    HTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionResolutionError,
    SafetensorsParsingError,
    FileMetadataError,
)


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what the Hub client raises inside the block into a ``CheckpointError``.

    Args:
        repo_id: The repository, for the message.
    """
    try:
        yield
    except _HUB_ERRORS as error:
        raise CheckpointError(f"{repo_id}: {error}\n{next_step(repo_id, error)}") from error


def is_unreachable(error: Exception) -> bool:
    """Whether the Hub gave no answer (offline, connection, server down), so a cache may serve."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, HTTPError | OfflineModeIsEnabled)


def next_step(repo_id: str, error: Exception) -> str:
    """The line added to the Hub's own message: what the user can do about it."""
    login = "run `hf auth login`, or pass token=..."
    if isinstance(error, GatedRepoError):
        return f"Next: ask for access on the page of {repo_id}, then {login}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"Next: check the spelling; there is no local folder {repo_id!r} either. "
            f"If the repository is private, {login}"
        )
    if isinstance(error, RevisionNotFoundError):
        return "Next: pass revision= a branch, tag or full commit hash that this repository has"
    if isinstance(error, RemoteEntryNotFoundError):
        return "Next: check the file list of this revision; pass another revision= or layers="
    if isinstance(error, LocalTokenNotFoundError):
        return f"Next: {login}"
    if isinstance(error, HFValidationError):
        return "Next: pass an existing folder or a Hub id such as 'owner/name'"
    if isinstance(error, LocalEntryNotFoundError | RevisionResolutionError | OfflineModeIsEnabled):
        return (
            "Next: load these layers once with a connection (HF_HUB_OFFLINE unset, "
            "local_files_only=False), or pass the cache_dir= that holds them"
        )
    if isinstance(error, SafetensorsParsingError):
        return "Next: the file on the Hub is damaged; try another revision= or tell its owner"
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"Next: {login} with a token that may do this"
    return (
        "Next: check the connection and HF_ENDPOINT and try again; what is already in the cache "
        "opens with local_files_only=True"
    )
