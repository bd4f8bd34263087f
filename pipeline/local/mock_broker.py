"""librdkafka's mock cluster in a process of its own: a stand-in where no real Kafka is available.

Its limits: in memory, about 5 MB per partition; topics are created on first use, with 4 partitions; CreateTime only;
no offsets for times; a consumer group of more than one member does not rebalance.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.local.process import ChildProcess, LocalServer

_PROGRAM = Path(__file__).with_name("mock_cluster.py")


class MockBroker(LocalServer):
    """One embedded broker on a free port of 127.0.0.1; a restart gives it another port and no topics."""

    name = "the embedded broker"
    start_seconds = 20.0

    def __init__(self) -> None:
        super().__init__("mock-broker")
        self._address_file = self._home / "address"

    @property
    def bootstrap_servers(self) -> str:
        """Address of the broker, host:port; known once it has started."""
        return self._address_file.read_text()

    def _launch(self) -> ChildProcess:
        self._address_file.unlink(missing_ok=True)
        # -P: the program's own folder has modules with the names of libraries, such as docker.
        command: list[str | Path] = [sys.executable, "-P", _PROGRAM, self._address_file]
        return ChildProcess(self.name, command, log_path=self.log_path)

    def _is_ready(self) -> bool:
        return self._address_file.exists()
