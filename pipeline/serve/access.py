"""Who is answered: those with the token, or, without one, those who call this machine by its own name."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Annotated, Final

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

_LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "::1")


def access_check(token: str | None, *, is_local: bool) -> Callable[..., Awaitable[None]] | None:
    """Return what checks a request for the agents' data; None if nothing is to be checked."""
    if token:
        return _bearer_check(token)
    return _require_local_name if is_local else None


def require_token(given: HTTPAuthorizationCredentials | None, token: str) -> None:
    """Refuse a request without this bearer token, by 401."""
    if given is None or not secrets.compare_digest(given.credentials.encode(), token.encode()):
        raise HTTPException(401, "a bearer token is required", {"WWW-Authenticate": "Bearer"})


def _bearer_check(token: str) -> Callable[..., Awaitable[None]]:
    async def check(
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> None:
        require_token(given, token)

    return check


async def _require_local_name(request: Request) -> None:
    if request.url.hostname not in _LOCAL_NAMES:
        names = ", ".join(_LOCAL_NAMES)
        raise HTTPException(403, f"without AGENT_METADATA_SERVE_TOKEN only these names are answered here: {names}")
