"""A fixture of several tests: a connection to a database with all tables."""

import asyncpg
import pytest

from pipeline.postgres.migrations import migrate


@pytest.fixture
async def connection(database_url):
    connection = await asyncpg.connect(database_url)
    await migrate(connection)
    yield connection
    await connection.close()
