"""Faults of the schema registry, which only scenarios with schemas have."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bench.harness import say
from pipeline.local import PackagedRegistry, registry_folder
from tests.chaos.harness import Run


@asynccontextmanager
async def started(run: Run) -> AsyncIterator[str]:
    """A registry for this run."""
    registry = PackagedRegistry(await asyncio.to_thread(registry_folder, say))
    try:
        await asyncio.to_thread(registry.start)
        run.registry = registry
        yield ""
    finally:
        await asyncio.to_thread(registry.close)


@asynccontextmanager
async def crashed(run: Run) -> AsyncIterator[None]:
    """Killed, and started in the end, with the schemas that it had."""
    assert run.registry is not None
    await asyncio.to_thread(run.registry.kill)
    try:
        yield
    finally:
        await asyncio.to_thread(run.registry.start)
