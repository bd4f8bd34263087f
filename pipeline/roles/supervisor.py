"""Run worker and sink as two processes under one command: restart either when it ends, stop the worker first."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from typing import Final

import structlog

from pipeline.errors import ExitCode
from pipeline.roles.process import child_command
from pipeline.settings import SHUTDOWN_SECONDS

_FIRST_RESTART_SECONDS: Final = 1.0
_LONGEST_RESTART_SECONDS: Final = 30.0
# A process that ran this long was healthy: its next restart is quick again.
_HEALTHY_SECONDS: Final = 60.0

_log = structlog.get_logger(__name__)


class Supervisor:
    """Keeps one process per role alive until it is stopped."""

    def __init__(self, environments: Mapping[str, Mapping[str, str]]) -> None:
        """Prepare; `environments` maps each role to variables of its own, in the order in which the roles stop."""
        self._environments = environments
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._stop = asyncio.Event()
        self._exit_code: int = ExitCode.OK

    async def run(self) -> int:
        """Run until SIGTERM or SIGINT, or until a role finds its settings wrong; return the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        keepers = {role: asyncio.create_task(self._keep(role)) for role in self._environments}
        for keeper in keepers.values():
            keeper.add_done_callback(lambda _: self._stop.set())  # after an error too, which gather() raises below
        await self._stop.wait()
        for role in keepers:  # the worker first: the sink then applies what it leaves
            await self._end(role)
        await asyncio.gather(*keepers.values())
        return self._exit_code

    def _on_signal(self, number: int) -> None:
        """Stop cleanly; on a second signal, kill: what the roles had not committed is read again from Kafka."""
        if self._stop.is_set():
            self._exit_code = 128 + number
            for process in self._processes.values():
                if process.returncode is None:
                    process.kill()
        self._stop.set()

    async def _keep(self, role: str) -> None:
        loop = asyncio.get_running_loop()
        pause = _FIRST_RESTART_SECONDS
        while not self._stop.is_set():
            started = loop.time()
            process = self._processes[role] = await asyncio.create_subprocess_exec(
                *child_command([sys.executable, "-m", "pipeline", role]),
                env={**os.environ, **self._environments[role]},
                start_new_session=True,  # Ctrl-C reaches only this process, which then stops the roles in order
            )
            if self._stop.is_set():  # while the process was being started: run() did not see it
                await self._end(role)
            code = await process.wait()
            if self._stop.is_set():
                if code != -signal.SIGTERM:  # that is a role stopped before it could handle signals
                    self._exit_code = self._exit_code or abs(code)
                return
            if code == ExitCode.USAGE:
                self._exit_code = code
                self._stop.set()
                return
            if loop.time() - started > _HEALTHY_SECONDS:
                pause = _FIRST_RESTART_SECONDS
            _log.warning("role_ended", role=role, exit_code=code, restart_in_seconds=pause)
            try:
                await asyncio.wait_for(self._stop.wait(), pause)
            except TimeoutError:
                pause = min(pause * 2, _LONGEST_RESTART_SECONDS)

    async def _end(self, role: str) -> None:
        process = self._processes.get(role)
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), SHUTDOWN_SECONDS + 5)
        except TimeoutError:
            _log.error(
                "role_killed", role=role, advice="it did not stop in time; what it had not committed is in Kafka"
            )
            process.kill()
