"""The library's doors: the README's first Python example, exactly as printed, against a real pipeline."""

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE

import pytest

from tests.support.deployment import DEADLINE_SECONDS
from tests.support.documentation import first_code

pytestmark = pytest.mark.services


async def test_example_of_the_readme_prints_what_it_reported(deploy, tmp_path):
    deployment = await deploy(events_topic="agent-metadata.events.v1")  # the producer's default
    await deployment.started("worker")
    await deployment.started("sink")
    script = tmp_path / "example.py"
    script.write_text(first_code("README.md", "python"), encoding="utf-8")
    environment = {**os.environ, **deployment.environment}
    example = await asyncio.create_subprocess_exec(
        sys.executable, script, env=environment, stdin=DEVNULL, stdout=PIPE, stderr=PIPE
    )
    try:
        printed, errors = await asyncio.wait_for(example.communicate(), DEADLINE_SECONDS)
    finally:
        if example.returncode is None:
            example.kill()
            await example.wait()
    assert (example.returncode, errors) == (0, b"")
    reported = await deployment.table()
    assert any(key in printed.decode() and value in printed.decode() for (_, key), (value, _, _) in reported.items())
