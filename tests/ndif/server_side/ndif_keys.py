"""NDIF's web application with its two kinds of API key, told apart without a key database.

On NDIF a key carries the tag `trusted` or (ordinary keys) does not, which decides whether a request
runs in the model's own process or in the sandbox. Without a database NDIF trusts every request;
here the key with the name `trusted` is trusted and every other request is not.
"""

from __future__ import annotations

# Before nnsight, which ndif imports: nnsight gives every object a `save`, and anyio's classes, that
# it makes at the first request over 1 MB otherwise, refuse attributes without an annotation.
from anyio.abc import SocketAttribute  # noqa: F401
from fastapi import Form, Header
from ndif.common.schema.request import BackendRequestModel
from ndif.services.api.app import app
from ndif.services.api.auth import validate_request

TRUSTED_KEY = "trusted"


async def by_key(
    data: str = Form(...), api_key: str | None = Header(default=None, alias="ndif-api-key")
) -> BackendRequestModel:
    """NDIF's own validation, then the mode by the key's name."""
    request = await validate_request(data, api_key)
    request.trusted = api_key == TRUSTED_KEY
    return request


app.dependency_overrides[validate_request] = by_key
