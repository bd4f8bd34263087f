"""Serve librdkafka's mock cluster until killed; run as a script (`mock_cluster.py ADDRESS_FILE`).

It imports nothing of this package, so that it runs wherever its parent found the package.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from confluent_kafka import Producer


def main(address_file: Path) -> None:
    """Serve until killed; the file appears, whole, once the broker has an address."""
    # The cluster lives inside this client. Its own bootstrap.servers is ignored, but must be set.
    cluster = Producer({"bootstrap.servers": "mock", "test.mock.num.brokers": 1, "log_level": 0})
    (broker,) = cluster.list_topics(timeout=10).brokers.values()
    draft = address_file.with_suffix(".draft")
    draft.write_text(f"{broker.host}:{broker.port}")
    draft.rename(address_file)
    signal.pause()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
