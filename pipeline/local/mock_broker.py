"""librdkafka's mock cluster in a process of its own: a stand-in where no real Kafka can be had.

Its limits: in memory, about 5 MB a partition; topics come by themselves, with 4 partitions; CreateTime only;
no offsets for times; a consumer group of more than one member does not rebalance.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

from pipeline.errors import ServiceUnavailable
from pipeline.local.folder import ThrowawayFolder
from pipeline.local.process import ChildProcess

_PROGRAM = Path(__file__).with_name("mock_cluster.py")
_START_SECONDS = 20.0


class MockBroker:
    """One embedded broker at a free port of 127.0.0.1, ended with the context or with this process."""

    def __init__(self) -> None:
        self._folder = ThrowawayFolder("mock-broker")
        self._home = self._folder.path
        self._address_file = self._home / "address"
        self._process: ChildProcess | None = None

    @property
    def bootstrap_servers(self) -> str:
        """Address of the broker, host:port; known once it has started."""
        return self._address_file.read_text()

    @property
    def pid(self) -> int:
        """Process id of the broker.

        Raises:
            ServiceUnavailable: it was never started.
        """
        if self._process is None:
            raise ServiceUnavailable("the embedded broker was not started: call start() first")
        return self._process.pid

    def start(self) -> None:
        """Return when the broker has an address.

        Raises:
            ServiceUnavailable: it did not come up; the message ends with what it logged last.
        """
        # -P: the program's own folder has modules with the names of libraries, such as docker.
        command: list[str | Path] = [sys.executable, "-P", _PROGRAM, self._address_file]
        self._process = ChildProcess("the embedded broker", command, log_path=self._home / "mock.log")
        self._process.wait_ready(self._address_file.exists, _START_SECONDS)

    def close(self) -> None:
        """End the broker and remove its folder."""
        if self._process is not None:
            self._process.kill()
        self._folder.remove()

    def __enter__(self) -> MockBroker:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
