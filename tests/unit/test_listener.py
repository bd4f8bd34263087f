"""The listener without a database, for what is hard to time with one."""

import asyncio
import uuid

import pytest

import pipeline.listener
from pipeline.core.notify import encode_agent_id
from pipeline.listener import MetadataListener
from pipeline.testing import settle


class FakeConnection:
    """Takes the listener's callbacks, for a test to call."""

    def add_termination_listener(self, callback):
        self.cut = callback

    async def add_listener(self, channel, callback):
        self.notify = callback

    async def fetch(self, _query, *_arguments):
        return []

    def terminate(self):
        pass


@pytest.mark.parametrize("turns", range(6))
async def test_cancel_together_with_a_notification_ends_the_listener(monkeypatch, turns):
    connection = FakeConnection()

    async def connect(_database_url, _url_setting):
        return connection

    async def listen():
        async for _ in MetadataListener("postgresql://nowhere").changes():
            pass

    monkeypatch.setattr(pipeline.listener, "connect", connect)

    listening = asyncio.create_task(listen())
    await settle()
    connection.notify(connection, 1, "channel", encode_agent_id(uuid.UUID(int=1)))
    for _ in range(turns):
        await asyncio.sleep(0)
    listening.cancel()
    await asyncio.wait([listening], timeout=1)
    assert listening.cancelled()
