"""Where what was made of a repository's files is kept: the Hub's assets cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import cached_assets_path, constants

from nnsight_transcoders.errors import CheckpointError

LIBRARY = "nnsight-transcoders"


def assets_folder(where: str, cache_dir: str | Path | None, *place: str) -> Path:
    """The folder for one repository and commit; made if it is not there.

    Args:
        where: What to call the checkpoint in messages.
        cache_dir: The cache the caller named: its folder ``assets`` is used.
        *place: Two names.

    Raises:
        CheckpointError: It cannot be made.
    """
    assets = Path(constants.HF_ASSETS_CACHE)
    if cache_dir is not None:
        assets = Path(cache_dir).expanduser() / "assets"
    try:
        return cached_assets_path(LIBRARY, *place, assets_dir=assets)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"what is made of {where} has to be kept, and there is no place for it: {error}. Pass "
            "a cache_dir= that can be written"
        ) from error
