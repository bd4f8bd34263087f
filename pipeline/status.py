"""What an operator sees of a running pipeline at one moment, and whether it is healthy."""

from __future__ import annotations

from datetime import datetime

import msgspec


class PartitionStatus(msgspec.Struct):
    """How far worker and sink are with one partition.

    Units: lags in records (of the events topic, of the batches topic); `*_behind_seconds` is how long the oldest record
    that is not done yet has waited. `open_pairs` is None where no worker's metrics can be read.
    """

    partition: int
    worker_lag: int = 0
    worker_behind_seconds: float = 0.0
    open_pairs: int | None = None
    sink_lag: int = 0
    sink_behind_seconds: float = 0.0
    last_applied_at: datetime | None = None


class TableStatus(msgspec.Struct):
    """What the table holds; an agent is stale if its newest value is too old."""

    rows: int
    agents: int
    stale_agents: int


class Status(msgspec.Struct):
    """One look at everything. None: could not be had (metrics), or not in time (the table)."""

    workers: int
    sinks: int
    partitions: list[PartitionStatus]
    dead_letters: int
    table: TableStatus | None
    outage_seconds: float | None = None
    is_table_emptied: bool = False

    def problems(self, *, worker_may_lag_seconds: float, sink_may_lag_seconds: float) -> list[str]:
        """Say what is wrong, one line each; nothing, if the pipeline is healthy."""
        found = []
        if not self.workers:
            found.append("no worker is in its consumer group: start one (`agent-metadata worker`)")
        if not self.sinks:
            found.append("no sink is in its consumer group: start one (`agent-metadata sink`)")
        worker = max((item.worker_behind_seconds for item in self.partitions), default=0.0)
        if worker > worker_may_lag_seconds:
            found.append(f"the worker is {worker:.0f} s behind: see its log; more workers share the partitions")
        sink = max((item.sink_behind_seconds for item in self.partitions), default=0.0)
        if sink > sink_may_lag_seconds:
            found.append(f"the sink is {sink:.0f} s behind: see its log, and whether Postgres is slow")
        if self.outage_seconds:
            found.append(f"a sink holds batches back for {self.outage_seconds:.0f} s: Postgres is away")
        if self.is_table_emptied:
            found.append("the table was emptied: a sink refills it by itself, or `agent-metadata refill` does")
        return found
