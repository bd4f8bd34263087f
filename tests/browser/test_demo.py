"""`agent-metadata demo --serve`, seen in a browser."""

import asyncio
import os
import subprocess
import sys

import pytest
from playwright.async_api import expect

from pipeline.local.process import free_port

pytestmark = [pytest.mark.browser, pytest.mark.services]


def start(environment, log_path):
    command = ["demo", "--serve", "--agents=20", "--keys=3", "--window=0.5", "--duration=20"]
    with log_path.open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", "pipeline", *command], env=environment, stdout=log, stderr=log)


async def test_demo_shows_its_agents_live_while_it_runs(page, bootstrap_servers, database_url, tmp_path):
    port = free_port()
    environment = {
        **os.environ,
        "KAFKA_BOOTSTRAP_SERVERS": bootstrap_servers,
        "DATABASE_URL": database_url,
        "AGENT_METADATA_SERVE_PORT": str(port),
        "PYTHONUNBUFFERED": "1",
    }
    log_path = tmp_path / "demo.log"
    demo = start(environment, log_path)
    try:
        async with asyncio.timeout(90):
            while "live page: " not in log_path.read_text():
                assert demo.poll() is None, log_path.read_text()
                await asyncio.sleep(0.1)
        await page.goto(f"http://127.0.0.1:{port}/")
        await expect(page.locator("#summary")).to_contain_text("20 agents · 60 pairs", timeout=60_000)
        first = page.locator(".agent").first
        before = await first.text_content()
        await expect(first).not_to_have_text(before, timeout=60_000)
        assert await asyncio.to_thread(demo.wait, 90) == 0, log_path.read_text()
    finally:
        if demo.poll() is None:
            demo.terminate()
        demo.wait(60)
