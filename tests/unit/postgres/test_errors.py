"""What asyncpg raises, and what the pipeline makes of it."""

import asyncpg
import pytest

from pipeline.errors import ServiceUnavailable
from pipeline.postgres.errors import translated_errors


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(),
        TimeoutError(),
        asyncpg.InterfaceError("the connection is closed"),
        # What a cut between two messages of asyncpg's own ends in.
        asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress"),
        asyncpg.ProgramLimitExceededError("too many notifications in the NOTIFY queue"),
        asyncpg.ReadOnlySQLTransactionError("cannot execute UPDATE in a read-only transaction"),
    ],
)
async def test_outage_is_something_to_wait_out(error):
    with pytest.raises(ServiceUnavailable):
        async with translated_errors("testing"):
            raise error
