"""When windows end: tumbling windows of processing time, at a phase of each partition's own.

worker/partition.py opens and closes them by these times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta

from pipeline.core.decoding import RecordDecoder
from pipeline.core.window import UNLIMITED, OpenWindow


@dataclass(frozen=True)
class TumblingWindows:
    """Windows that each end where the next begins, and what one of them may hold.

    Every partition ends its windows at a phase of its own, so that the database sees an even load. Only the first
    window of a partition, and the one after a close at capacity, last their whole size from their start instead (as
    metadatabatcher's timer does): what waits in the topic at startup folds into one window.

    Units: `size_seconds` may be a fraction (Faust's own windows take whole seconds only); `capacity` counts unique
    (agent_id, key) pairs; `max_bytes` is what the pairs of large reports may take (see OpenWindow).
    """

    size_seconds: float
    partitions: int
    capacity: int
    max_clock_skew: timedelta
    max_bytes: int = UNLIMITED

    def open(self, start: float, decoder: RecordDecoder) -> OpenWindow:
        """Open a window; a partition's windows share `decoder`."""
        return OpenWindow(
            start,
            capacity=self.capacity,
            max_bytes=self.max_bytes,
            max_clock_skew=self.max_clock_skew,
            decoder=decoder,
        )

    def full_end(self, now: float) -> float:
        """Return the end of a window that opens now and lasts its whole size."""
        return now + self.size_seconds

    def aligned_end(self, partition: int, now: float) -> float:
        """Return the first end after `now` that falls on the partition's phase.

        Phases count from the Unix epoch, so that all workers agree on them.
        """
        phase = self.size_seconds * (partition % self.partitions) / self.partitions
        end = (math.floor((now - phase) / self.size_seconds) + 1) * self.size_seconds + phase
        return end if end > now else end + self.size_seconds  # rounding
