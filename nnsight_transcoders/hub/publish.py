"""Uploading a set to the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError

from nnsight_transcoders._version import __version__
from nnsight_transcoders.errors import InputError
from nnsight_transcoders.hub.assets import LIBRARY
from nnsight_transcoders.hub.card import MARKER
from nnsight_transcoders.hub.hub_errors import hub_errors
from nnsight_transcoders.hub.native import save_set
from nnsight_transcoders.sets import TranscoderSet


def push_set(
    transcoders: TranscoderSet,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    metrics: Mapping[Any, Any] | None = None,
    license: str | None = None,
    create_pr: bool = False,
) -> str:
    """Write a set to a temporary folder and upload it; the repository is made if it is not there.

    Args:
        transcoders: The set.
        repo_id: ``"owner/name"``.
        private: Whether a repository that is made now is private.
        token: Hub token, or True for the stored one.
        revision: Branch to upload to; made if it is not there.
        commit_message: Message of the commit.
        metrics: As for ``save_set``.
        license: Licence of the weights, as the Hub names it.
        create_pr: Open a pull request instead of writing to the branch.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        InputError: ``create_pr`` together with ``revision``.
        CheckpointError: The Hub refuses or cannot be reached.
    """
    if create_pr and revision is not None:
        raise InputError(
            "create_pr=True opens a pull request against the main branch; leave out revision="
        )
    api = HfApi(token=token, library_name=LIBRARY, library_version=__version__)
    with tempfile.TemporaryDirectory() as temporary, hub_errors(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        folder = save_set(
            transcoders, Path(temporary) / "set", metrics=metrics, license=license, repo_id=repo_id
        )
        if not _may_replace_card(api, repo_id, revision):
            (folder / "README.md").unlink()
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload transcoders with nnsight-transcoders",
            create_pr=create_pr,
        )
    return commit.pr_url or commit.commit_url


def _may_replace_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether the repository has no card yet, or one that its author has not taken over."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            path = api.hf_hub_download(repo_id, "README.md", revision=revision, local_dir=temporary)
        except RemoteEntryNotFoundError:
            return True
        return MARKER in Path(path).read_text(encoding="utf-8", errors="replace")
