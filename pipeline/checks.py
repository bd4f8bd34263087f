"""What several groups of settings have in common: secrets as clients take them, and values that can't be right."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import SecretStr


def secret_text(secret: SecretStr | None) -> str:
    """Return a secret as clients take it; empty where it is unset."""
    return secret.get_secret_value() if secret else ""


def refuse_wrong_url(url: str, setting: str, *, login: str) -> None:
    """Refuse what is no URL, without showing it, as it may hold a secret; `login` names the settings for that.

    Raises:
        ValueError: it is none, or holds a user or a password.
    """
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("https", "http") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_url = False
    if not is_url:
        raise ValueError(f"{setting} must be a URL: https://host/path")
    if "@" in parts.netloc:
        raise ValueError(f"{setting} holds a user or a password: use {login}")


def token_problem(token: str) -> str | None:
    """Return why a text can't be a bearer token, or None."""
    # Source: RFC 6750, section 2.1.
    if not token or re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", token):
        return None
    return "may contain only letters, digits and ._~+/-, with = at the end"


def refuse_unreadable(setting: str, file: str) -> None:
    """Refuse a PEM file that can't be opened.

    Raises:
        ValueError: it can't; the message says why.
    """
    try:
        with Path(file).open("rb"):
            pass
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise ValueError(f"{setting}={file}: {reason}; name a PEM file that this user may read") from None
