"""A headless Chromium that is installed on this machine; a page that fails its test if the browser complains."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import Browser, Page, async_playwright

from tests.conftest import unavailable

# No sandbox: CI runs as root. The others keep the browser from requesting anything that is not on this machine.
_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        unavailable("no Chromium is installed", required_by="PIPELINE_REQUIRE_BROWSER")
    async with async_playwright() as playwright:
        started = await playwright.chromium.launch(executable_path=chromium, args=_ARGUMENTS)
        yield started
        await started.close()


def is_expected(message: str) -> bool:
    """Tell whether it is the browser's own message about a server that is down or requires a token."""
    return message.startswith("Failed to load resource") or "net::ERR_" in message


@pytest.fixture
async def page(browser: Browser, request: pytest.FixtureRequest) -> AsyncIterator[Page]:
    options: dict[str, Any] = getattr(request, "param", {})
    opened = await browser.new_page(viewport={"width": 1280, "height": 720}, **options)
    opened.set_default_timeout(60_000)
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("dialog", lambda dialog: complaints.append(f"a dialog: {dialog.message}"))
    opened.on("console", lambda message: complaints.append(message.text) if not is_expected(message.text) else None)
    yield opened
    assert complaints == []
