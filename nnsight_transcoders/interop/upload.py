"""Uploading a graph to Neuronpedia: a signed address, the compressed file, an entry.

Everything that Neuronpedia would refuse is found here first, before anything is sent. The key goes
to Neuronpedia only, never to the address where the file is put, and into no message.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nnsight_transcoders.errors import InputError, UploadError

from .read_json import load_json
from .schema import validate_graph

BASE_URL = "https://www.neuronpedia.org"
#: Where the key is looked for.
KEY_VARIABLE = "NEURONPEDIA_API_KEY"
#: What Neuronpedia takes, in bytes as sent (compressed).
MIN_BYTES, MAX_BYTES = 1 << 10, 100 << 20
#: How much of a refusal's own words is shown.
MAX_SAID = 1000
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def upload_graph(
    source: str | Path | Mapping[str, Any],
    *,
    api_key: str | None = None,
    base_url: str = BASE_URL,
    timeout: float = 120.0,
) -> str:
    """Upload a graph that ``to_neuronpedia`` made.

    Args:
        source: The JSON, as a file or as Python objects. Its ``scan`` must be a model that
            Neuronpedia has. A graph of your own with the same ``slug`` is replaced; another
            user's is not, and the upload is refused.
        api_key: Neuronpedia's key of the account; default: the variable ``NEURONPEDIA_API_KEY``.
        base_url: Where Neuronpedia is.
        timeout: Seconds to wait for each answer.

    Returns:
        The graph's address.

    Raises:
        InputError: No key, an address without https, or a size that Neuronpedia refuses.
        CheckpointError: A graph that it would refuse.
        UploadError: It refused, did not answer, or answered with something else.
    """
    key = api_key or os.environ.get(KEY_VARIABLE, "")
    if not key or not key.isascii() or not key.isprintable():
        raise InputError(
            f"no usable API key: set {KEY_VARIABLE} to the key from neuronpedia.org/account, or "
            "pass api_key="
        )
    _check_address("base_url", base_url)
    data = source if isinstance(source, Mapping) else load_json(Path(source))
    validate_graph(data, "neuronpedia")
    body = gzip.compress(json.dumps(data, allow_nan=False, separators=(",", ":")).encode())
    if not MIN_BYTES <= len(body) <= MAX_BYTES:
        raise InputError(
            f"the graph has {len(body)} bytes compressed; Neuronpedia takes {MIN_BYTES} to "
            f"{MAX_BYTES}. Prune it more, or less"
        )
    return _send(data["metadata"]["slug"], body, key, base_url.rstrip("/"), timeout)


def _send(slug: str, body: bytes, key: str, base_url: str, timeout: float) -> str:
    try:
        import httpx  # comes with huggingface_hub
    except ImportError as error:
        raise InputError("uploading needs httpx: pip install httpx") from error
    wanted = {
        "filename": f"{slug}.json",
        "contentLength": len(body),
        "contentType": "application/json",
    }
    try:
        with httpx.Client(timeout=timeout) as client:
            headers = {"X-Api-Key": key}
            signed = _answer(
                client.post(f"{base_url}/api/graph/signed-put", json=wanted, headers=headers),
                ("url", "putRequestId"),
            )
            _check_address("the address to put the file at", signed["url"])
            put = client.put(
                signed["url"],
                content=body,
                headers={"Content-Encoding": "gzip", "Content-Type": "application/json"},
            )
            if put.status_code not in (200, 201, 204):
                raise UploadError(f"the storage refused the file (status {put.status_code})")
            saved = _answer(
                client.post(
                    f"{base_url}/api/graph/save-to-db",
                    json={"putRequestId": signed["putRequestId"]},
                    headers=headers,
                ),
                ("url",),
            )
    except httpx.HTTPError as error:
        raise UploadError(
            f"Neuronpedia at {base_url} could not be reached: {type(error).__name__}: {error}"
        ) from error
    return saved["url"]


def _answer(response: Any, keys: tuple[str, ...]) -> dict[str, str]:
    """The JSON of an answer with these texts in it.

    Raises:
        UploadError: A refusal, with what may have caused it, or another answer.
    """
    path, status = response.request.url.path, response.status_code
    if status != 200:
        causes = {
            401: "the API key is not accepted",
            403: "the API key may not do this",
            404: "the address is wrong, or what it asks for is not there",
            413: "the graph is too large: prune it more",
            429: "too many requests: wait, then try again",
        }
        cause = causes.get(status, "try again later" if status >= 500 else "it refused")
        raise UploadError(f"{path} answered {status}: {cause}{_said(response)}")
    try:
        found = response.json()
    except ValueError as error:
        raise UploadError(f"{path} answered with something that is no JSON") from error
    if not isinstance(found, dict) or not all(isinstance(found.get(key), str) for key in keys):
        raise UploadError(f"{path} answered without {' and '.join(keys)}")
    return found


def _said(response: Any) -> str:
    """A server's own words, cut and on one line."""
    text = " ".join(response.text[:MAX_SAID].split())
    return f" ({text})" if text else ""


def _check_address(what: str, url: str) -> None:
    """Refuse to send anything in the clear, but to this machine."""
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return
    if parts.scheme == "http" and parts.hostname in _LOOPBACK:
        return
    raise InputError(f"{what} must start with https://, got {url[:80]!r}")
