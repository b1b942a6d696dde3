"""A language model behind an OpenAI-compatible address, as a function from messages to text.

Only the standard library is used. Nothing is sent unless a caller makes such a function and hands
it on: what is sent are the texts of feature examples.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from nnsight_transcoders.errors import EndpointError, InputError

#: A chat message: ``{"role": "user", "content": "..."}``.
Message = dict[str, str]

#: What labelling needs: the answer to a conversation.
Ask = Callable[[Sequence[Message]], str]

#: Answers that may be better a moment later.
_TRY_AGAIN = {408, 429, 500, 502, 503, 504}

_LONGEST_ANSWER = 2**20


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are refused: they would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def openai_endpoint(
    base_url: str,
    model: str,
    *,
    api_key: str | None = None,
    timeout: float = 60.0,
    attempts: int = 3,
    **options: Any,
) -> Ask:
    """A model behind ``{base_url}/chat/completions``, to hand to ``explain_features``.

    Args:
        base_url: Such as ``"http://localhost:8000/v1"``.
        model: The model's name there.
        api_key: Sent as a bearer token (default: the environment's ``OPENAI_API_KEY``, if set).
        timeout: Of each request, in seconds.
        attempts: How often a request is tried that failed for the moment.
        **options: More of the request's fields, such as ``temperature=0``.

    Raises:
        InputError: An address that is not http(s), or that would send a key without encryption.
    """
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"base_url must be an http(s) address, got {base_url!r}")
    if attempts < 1:
        raise InputError(f"attempts must be at least 1, got {attempts}")
    key = os.environ.get("OPENAI_API_KEY") if api_key is None else api_key
    local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if key and parts.scheme == "http" and not local:
        raise InputError(f"the key would go to {parts.hostname} unencrypted: use https")
    address = f"{base_url.rstrip('/')}/chat/completions"
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"

    def ask(messages: Sequence[Message]) -> str:
        body = json.dumps({"model": model, "messages": list(messages), **options}).encode()
        request = urllib.request.Request(address, body, headers, method="POST")
        return _answer(_sent(request, timeout, attempts), address)

    return ask


def _sent(request: urllib.request.Request, timeout: float, attempts: int) -> bytes:
    """The body of the answer."""
    opener = urllib.request.build_opener(_NoRedirect)
    for attempt in range(1, attempts + 1):
        try:
            with opener.open(request, timeout=timeout) as response:
                return response.read(_LONGEST_ANSWER)
        except urllib.error.HTTPError as error:
            said = error.read(300).decode("utf-8", "replace").strip()
            if error.code not in _TRY_AGAIN or attempt == attempts:
                raise EndpointError(
                    f"{request.full_url} answered {error.code} {error.reason}: {said}"
                ) from error
            wait = _seconds(error.headers.get("Retry-After"), attempt)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            if attempt == attempts:
                raise EndpointError(f"cannot reach {request.full_url}: {error}") from error
            wait = _seconds(None, attempt)
        time.sleep(wait)
    raise AssertionError("not reached")


def _seconds(asked: str | None, attempt: int) -> float:
    """How long to wait: what the server asks for, up to a minute, or 1, 2, 4, ... seconds."""
    if asked is not None and asked.isdigit():
        return min(60.0, float(asked))
    return 2.0 ** (attempt - 1)


def _answer(body: bytes, address: str) -> str:
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise EndpointError(f"{address} gave no chat completion: {body[:200]!r}") from error
    if not isinstance(text, str):
        raise EndpointError(f"{address} gave a chat completion without text")
    return text
