"""Tell Postgres's errors apart by SQLSTATE: what to retry, what to dead-letter, what to stop at."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import asyncpg

from pipeline.certificates import certificate_complaint
from pipeline.errors import ConfigError, PipelineError, RowRejected, SchemaMismatch, ServiceUnavailable

# By a SQLSTATE's class, its first two characters. Anything else counts as an outage: holding a batch back loses
# nothing, a dead letter might.
_DATA_ERRORS: Final = ("21", "22", "23")
_LOGIN_ERRORS: Final = ("28", "3D")
_CONFIG_ERRORS: Final = ("0A", "28", "3D", "3F", "42")
_UNDEFINED_TABLE: Final = "42P01"
_UNDEFINED_COLUMN: Final = "42703"
# InternalClientError is what asyncpg raises when a connection is cut between two of its messages.
CONNECTION_ERRORS: Final = (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.InternalClientError)


@asynccontextmanager
async def translated_errors(activity: str, url_setting: str = "DATABASE_URL") -> AsyncIterator[None]:
    """Translate asyncpg's errors into ours, by SQLSTATE and never by message text.

    Messages name the `activity` ("connecting") and `url_setting`, the setting that the database's URL comes from.

    Raises:
        RowRejected: the data itself is refused (classes 21, 22, 23).
        SchemaMismatch, ConfigError: tables, rights, the password or the database are wrong (0A, 28, 3D, 3F, 42).
        ServiceUnavailable: anything else, such as connections, resources, locks, shutdown, read-only.
    """
    try:
        yield
    except asyncpg.PostgresError as error:
        raise _translate(error, activity, url_setting) from error
    except ssl.SSLCertVerificationError as error:
        complaint = certificate_complaint(error, ca_setting=f"{url_setting}?sslrootcert=FILE")
        raise ServiceUnavailable(f"Postgres can't be trusted: {complaint}") from error
    except CONNECTION_ERRORS as error:
        detail = str(error) or type(error).__name__
        raise ServiceUnavailable(
            f"Postgres did not answer while {activity}: {detail}; is it up, and is {url_setting} right?"
        ) from error


def _translate(error: asyncpg.PostgresError, activity: str, url_setting: str) -> PipelineError:
    state = error.sqlstate or ""
    first_line = str(error).splitlines()[0]
    message = f"{first_line} (SQLSTATE {state})"
    if state.startswith(_DATA_ERRORS):
        return RowRejected(first_line, sqlstate=state)
    if state in (_UNDEFINED_TABLE, _UNDEFINED_COLUMN):
        return SchemaMismatch(f"{message}: run `agent-metadata db migrate`")
    if state.startswith(_CONFIG_ERRORS):
        advice = f"; check user, password and database in {url_setting}" if state.startswith(_LOGIN_ERRORS) else ""
        return ConfigError(f"Postgres refused {activity}: {message}{advice}")
    return ServiceUnavailable(f"Postgres is unavailable while {activity}: {message}")
