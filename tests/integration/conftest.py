"""A connection to a fresh database with all tables."""

import asyncpg
import pytest

from pipeline.postgres.migrations import migrate


@pytest.fixture
async def connection(database_url):
    connection = await asyncpg.connect(database_url)
    await migrate(connection)
    yield connection
    await connection.close()
