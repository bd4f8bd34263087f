"""A worker, sink or listener under supervision: a process, and the next one when it ends."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tests.support.deployment import eventually

if TYPE_CHECKING:
    from tests.chaos.harness import Run

STOP_SECONDS = 30.0
_RESTART_SECONDS = 0.3


class Member:
    """One worker, sink or listener, started again by its supervisor whenever it ends, however it ends.

    `ends` has a line for each process that ended without being asked to, or with an error.
    """

    def __init__(self, run: Run, role: str, *arguments: str, module: Sequence[str] | None = None) -> None:
        self.role = role
        self.ends: list[str] = []
        self.has_left = False
        self._run = run
        self._arguments = (role, *arguments)
        self._module = module  # see Run.start
        self._expected_ends: set[int] = set()  # process ids
        self.process: Any = run.start(*self._arguments, module=self._module)
        self._supervisor = asyncio.create_task(self._supervise())

    async def _supervise(self) -> None:
        while not self.has_left:
            code = self.process.poll()
            if code is None:
                await asyncio.sleep(0.03)
                continue
            if self.process.pid not in self._expected_ends:
                last_line = self._run.deployment.log(self.process).strip().rpartition("\n")[2]
                self.ends.append(f"{self.role} ended with {code}: {last_line[-300:]}")
            await asyncio.sleep(_RESTART_SECONDS)
            if not self.has_left:
                self.process = self._run.start(*self._arguments, module=self._module)

    def kill(self) -> None:
        self._expected_ends.add(self.process.pid)
        self.process.kill()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def restart(self) -> None:
        """Ask it to end; return once it has, and its successor is started.

        Raises: AssertionError, if it does not end in time.
        """
        process = self.process
        self._expected_ends.add(process.pid)
        process.terminate()
        await eventually(f"{self.role} ends after SIGTERM", lambda: process.poll() is not None, STOP_SECONDS)
        if process.returncode != 0:
            self.ends.append(f"{self.role} ended with {process.returncode} after SIGTERM")
        await eventually(f"{self.role} is started again", lambda: self.process is not process)

    async def upgrade(self, module: Sequence[str] | None) -> None:
        """As `restart`; its successor, and all after that, are run as this module, None being today's version."""
        self._module = module
        await self.restart()

    async def leave(self) -> None:
        """Ask it to end for good."""
        self.has_left = True
        await self._supervisor
        self.process.terminate()
        await eventually(f"{self.role} ends after SIGTERM", lambda: self.process.poll() is not None, STOP_SECONDS)

    def is_ready(self) -> bool:
        """Tell whether this process, not one before it, has its partitions."""
        return self.process.poll() is None and '"partitions_assigned"' in self._run.deployment.log(self.process)

    async def close(self) -> None:
        self.has_left = True
        self._supervisor.cancel()
        with suppress(asyncio.CancelledError):
            await self._supervisor
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
