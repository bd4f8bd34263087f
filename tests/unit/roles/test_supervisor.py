"""The supervisor, with processes that the test provides."""

import asyncio

from pipeline.roles import supervisor as supervise
from pipeline.roles.supervisor import Supervisor


async def test_stop_while_a_role_is_being_started_ends_it_and_exits_with_0(monkeypatch):
    make_process = asyncio.create_subprocess_exec
    is_making, is_stopped = asyncio.Event(), asyncio.Event()

    async def make_slowly(*_arguments, **_options):
        is_making.set()
        await is_stopped.wait()
        return await make_process("sleep", "60")

    monkeypatch.setattr(supervise.asyncio, "create_subprocess_exec", make_slowly)
    supervisor = Supervisor({"worker": {}})
    running = asyncio.create_task(supervisor.run())
    await is_making.wait()
    supervisor._stop.set()
    is_stopped.set()
    assert await asyncio.wait_for(running, 10) == 0
