"""What `serve` produces with."""

import asyncio

import pipeline.roles.serve
from pipeline.local.process import free_port
from pipeline.roles.serve import open_publisher
from pipeline.serve.reports import MAX_WAITING_REPORTS
from pipeline.settings import Settings


async def test_queue_of_kafkas_client_has_room_for_all_reports_that_may_wait(monkeypatch):
    monkeypatch.setattr(pipeline.roles.serve, "START_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", f"127.0.0.1:{free_port()}")
    settings = Settings()
    publisher = await open_publisher(settings, MAX_WAITING_REPORTS)
    try:
        async with asyncio.timeout(60):
            for _ in range(MAX_WAITING_REPORTS + 1000):
                await publisher.send(settings.events_topic, b"{}", key=b"agent")
    finally:
        await publisher.close(0)
