"""A Hub repository at one commit as a ``Snapshot``, and the choice between folder and Hub.

The revision is resolved to a commit once and that commit is used for every file, so a repository
that changes meanwhile cannot mix two versions. Files come down one by one when they are used; the
header of a file that is not here yet is read with a range request.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name
from torch import Tensor

from nnsight_transcoders._version import __version__
from nnsight_transcoders.errors import CheckpointError, ConfigError
from nnsight_transcoders.hub.assets import LIBRARY, assets_folder
from nnsight_transcoders.hub.hub_errors import hub_errors, is_unreachable
from nnsight_transcoders.hub.remote_file import open_remote
from nnsight_transcoders.hub.single_tensors import SingleTensors
from nnsight_transcoders.hub.snapshot import SHOWN, LocalSnapshot, Snapshot
from nnsight_transcoders.hub.tensors import TensorInfo


class HubSnapshot(Snapshot):
    """A Hub repository (or a folder of one) at one commit. Made by ``open_hub_snapshot``."""

    def __init__(
        self,
        api: HfApi,
        repo_id: str,
        commit: str,
        files: Sequence[str],
        *,
        subfolder: str = "",
        complete: bool = True,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> None:
        self._api, self.repo_id, self.commit, self.subfolder = api, repo_id, commit, subfolder
        self.cache_dir, self._local_files_only = cache_dir, local_files_only
        self._single: dict[str, SingleTensors] = {}
        self.complete = complete
        self._prefix = f"{subfolder}/" if subfolder else ""
        self.where = f"{repo_id}{'/' + subfolder if subfolder else ''} at {commit[:8]}"
        self.files = tuple(
            sorted(n.removeprefix(self._prefix) for n in files if n.startswith(self._prefix))
        )

    def provenance(self) -> dict[str, Any]:
        found: dict[str, Any] = {"repository": self.repo_id, "revision": self.commit}
        if self.subfolder:
            found["subfolder"] = self.subfolder
        return found

    def path(self, name: str) -> Path:
        self.require(name)
        with hub_errors(self.repo_id):
            return Path(
                self._api.hf_hub_download(
                    self.repo_id,
                    self._prefix + name,
                    revision=self.commit,
                    cache_dir=self.cache_dir,
                    local_files_only=self._local_files_only,
                )
            )

    def open(self, name: str) -> IO[bytes]:
        self.require(name)
        if self._is_here(name):
            return super().open(name)
        return open_remote(self._api, self.repo_id, self._prefix + name, self.commit)

    def _is_here(self, name: str) -> bool:
        """Whether a file is in the cache, or can only be there."""
        cached = try_to_load_from_cache(
            self.repo_id, self._prefix + name, cache_dir=self.cache_dir, revision=self.commit
        )
        return isinstance(cached, str) or self._local_files_only or constants.is_offline_mode()

    def tensor(self, name: str, key: str) -> Tensor:
        self.require(name)
        if self._is_here(name):
            return super().tensor(name, key)
        if name not in self._single:
            folder = None
            with suppress(CheckpointError):  # no place: nothing is kept
                folder = assets_folder(self.where, self.cache_dir, self.repo_id, self.commit)
            inside = self._prefix + name
            self._single[name] = SingleTensors(self._api, self.repo_id, inside, self.commit, folder)
        return self._single[name][key]

    def header(self, name: str) -> dict[str, TensorInfo]:
        self.require(name)
        if self._is_here(name):
            return super().header(name)
        with hub_errors(self.repo_id):
            remote = self._api.parse_safetensors_file_metadata(
                self.repo_id, self._prefix + name, revision=self.commit
            )
        return {
            key: TensorInfo(tuple(info.shape), str(info.dtype))
            for key, info in remote.tensors.items()
        }


def open_snapshot(
    repo_or_folder: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Snapshot:
    """A folder if there is one of that name, else a Hub repository.

    Args:
        repo_or_folder: A folder, ``"owner/name"``, or ``"owner/name/folder/in/it"``.
        revision: Branch, tag or commit of the repository.
        cache_dir: The Hub cache to use.
        token: Hub token, or True for the stored one.
        local_files_only: Do not ask the Hub.

    Raises:
        CheckpointError: Neither a folder nor a repository that can be reached.
        ConfigError: ``revision`` was given for a folder.
    """
    text = str(repo_or_folder)
    if not text:
        raise CheckpointError("the name is empty; pass a folder or a Hub id such as 'owner/name'")
    api = HfApi(token=token, library_name=LIBRARY, library_version=__version__)

    def open_other(name: str, other_revision: str | None) -> Snapshot:
        return open_hub_snapshot(api, name, other_revision, cache_dir, local_files_only)

    folder = Path(repo_or_folder).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(
                f"revision={revision!r} is for Hub repositories; {folder} is a folder"
            )
        snapshot: Snapshot = LocalSnapshot(folder)
        snapshot.cache_dir, snapshot.open_other = cache_dir, open_other
        return snapshot
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; pass the folder that holds the checkpoint")
    if isinstance(repo_or_folder, Path) or text.startswith(("/", ".", "~")):
        raise CheckpointError(f"there is no folder {text!r}; check the path")
    snapshot = open_other(text, revision)
    snapshot.open_other = open_other
    return snapshot


def open_hub_snapshot(
    api: HfApi,
    name: str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> HubSnapshot:
    """Resolve the revision to a commit and list its files, from the cache if need be."""
    parts = name.strip("/").split("/")
    repo_id, subfolder = "/".join(parts[:2]), "/".join(parts[2:])
    with hub_errors(repo_id):
        commit = api.resolve_revision(
            repo_id, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
        ).resolved
        files, complete = _list_files(api, repo_id, commit, cache_dir, local_files_only)
    snapshot = HubSnapshot(
        api,
        repo_id,
        commit,
        files,
        subfolder=subfolder,
        complete=complete,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    if subfolder and not snapshot.files:
        folders = sorted({str(PurePosixPath(file).parent) for file in files} - {"."})
        raise CheckpointError(
            f"{repo_id} has no folder {subfolder!r}; it has {', '.join(folders[:SHOWN]) or 'none'}"
        )
    return snapshot


def _list_files(
    api: HfApi,
    repo_id: str,
    commit: str,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> tuple[list[str], bool]:
    """The commit's files and whether that is all of them (from the Hub) or what is cached."""
    if not local_files_only:
        try:
            info = api.model_info(repo_id, revision=commit)
            return [file.rfilename for file in info.siblings or []], True
        except (HTTPError, OfflineModeIsEnabled) as error:
            if not is_unreachable(error):
                raise
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    folder = cache / repo_folder_name(repo_id=repo_id, repo_type="model") / "snapshots" / commit
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if not found:
        raise CheckpointError(
            f"the Hub cannot be asked for {repo_id}, and commit {commit} is not in the cache "
            f"{cache}. Next: open it once with a connection, or pass the cache_dir= that holds it"
        )
    return found, False
