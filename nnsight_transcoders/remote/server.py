"""Where remote requests go, and how large and how patient they may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nnsight_transcoders.errors import ConfigError, InputError

#: What results may be asked for in.
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class RemoteServer:
    """Settings of remote execution; ``remote=True`` stands for ``RemoteServer()``.

    Attributes:
        host: ``"http://host:port"``, ``"local"`` for nnsight's serialise-and-run in this process,
            or None for nnsight's own setting (``CONFIG.API.HOST``).
        max_bytes: Largest request, and largest result, in bytes. Estimated before anything is
            sent, and checked on the request itself.
        patience: Seconds for which a server that does not answer is tried again.
        timeout: Seconds to wait for one job; None waits for as long as it takes.
        dtype: Of what comes back, ``"bfloat16"`` say; None for what the model and the
            computation give.
    """

    host: str | None = None
    max_bytes: int = 512 * 2**20
    patience: float = 60.0
    timeout: float | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        host = self.host
        if host not in (None, "local") and not str(host).startswith(("http://", "https://")):
            raise ConfigError(
                f"remote server {host!r}: give 'http://host:port', 'https://host', 'local', or "
                "nothing for nnsight's own setting"
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r}: use {', '.join(DTYPES)} or None")
        if self.max_bytes < 1:
            raise ConfigError(f"max_bytes must be at least 1, got {self.max_bytes}")

    @property
    def local(self) -> bool:
        """Whether requests are only serialised and run here."""
        return self.host == "local"


#: What ``remote=`` arguments take.
Remote = bool | str | RemoteServer


def remote_server(remote: Remote | None) -> RemoteServer | None:
    """A ``remote=`` argument as settings; None for a model that is here.

    Raises:
        ConfigError: It is neither a bool, nor an address, nor settings.
    """
    if remote is None or remote is False:
        return None
    if remote is True:
        return RemoteServer()
    if isinstance(remote, str):
        return RemoteServer(host=remote.rstrip("/"))
    if isinstance(remote, RemoteServer):
        return remote
    raise ConfigError(
        f"remote={remote!r}: use True, 'local', 'http://host:port', or a RemoteServer"
    )


def check_remote_model(model: Any) -> None:
    """Check that a server could know the model.

    Raises:
        InputError: It is no model with a name that a server resolves.
    """
    from nnsight.modeling.mixins.remotable import Remotable

    if not isinstance(model, Remotable):
        raise InputError(
            f"remote execution needs a model with a name on the server, got {type(model).__name__}:"
            " use nnsight.TransformersModel('owner/name', task='text-generation')"
        )
