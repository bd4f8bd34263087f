"""A Faust transport that delivers one event per chunk of a partition's records, instead of one per record.

Faust spends about 80 microseconds on each event. Fed with chunks of some thousand records it spends them on the chunk.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import faust
from aiokafka.errors import IllegalStateError
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage

from pipeline.chunks import Chunk, fetch_in_chunks


class ChunkConsumerThread(driver.AIOKafkaConsumerThread):
    """The thread that runs aiokafka's consumer."""

    async def on_start(self) -> None:
        """Start the consumer and swap its fetcher's buffer, before there is an assignment to fetch for."""
        await super().on_start()
        fetch_in_chunks(self._ensure_consumer())

    async def check_errors(self) -> None:
        """Raise the error that keeps aiokafka out of its group: it waits to be asked, which Faust never does.

        To be called in this thread.
        """
        self._ensure_consumer()._coordinator.check_errors()


class _ForgetfulOffsets(dict[TP, int]):
    """Stands in for the offsets below which Faust drops a message: it remembers none.

    Faust writes down a message's offset after it has handed it on, over what a seek has set meanwhile, and would drop
    what is read again. The worker compares offsets itself.
    """

    def __missing__(self, tp: TP) -> None:
        return None

    def __setitem__(self, tp: TP, offset: int) -> None:
        pass

    def update(self, *_: Any, **__: Any) -> None:
        pass


class ChunkConsumer(driver.Consumer):
    """Faust's consumer; a message's value is a Chunk, its offset the chunk's first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._read_offset = _ForgetfulOffsets()

    def _new_consumer_thread(self) -> ChunkConsumerThread:
        return ChunkConsumerThread(self, loop=self.loop, beacon=self.beacon)

    def _to_message(self, tp: TP, record: Chunk) -> ConsumerMessage:
        return ConsumerMessage(
            tp.topic,
            tp.partition,
            record.start,
            0.0,  # each record has its own
            1,  # LogAppendTime
            (),
            None,
            record,
            None,
            tp=tp,
            generation_id=self.app.consumer_generation_id,
        )

    async def _seek(self, partition: TP, offset: int) -> None:
        # Faust's own calls aiokafka from this thread, in the middle of what the consumer's thread does.
        try:
            await self._thread.seek_wait({partition: offset})
        except IllegalStateError:
            self.log.info("no seek in %r: it was taken away meanwhile", partition)

    async def commit_offsets(self, offsets: Mapping[TP, int]) -> bool:
        """Commit explicit offsets; false if a rebalance has taken a partition away meanwhile.

        Faust's own commits go by acknowledged events, which loses data: its bookkeeping passes unacked ones.
        """
        assignment = self.assignment()
        mine = {tp: offset for tp, offset in offsets.items() if tp in assignment}
        if not mine:
            return False
        committed = await self._thread.commit(mine)
        if committed:
            self._committed_offset.update(mine)
        return bool(committed) and len(mine) == len(offsets)

    async def check_errors(self) -> None:
        """Raise what keeps this consumer out of its group, if anything: a right it lacks, an unexpected answer."""
        await self._thread.call_thread(self._thread.check_errors)

    def committed_offset(self, tp: TP) -> int | None:
        """Return where this partition was taken up, or None if nothing was ever committed for it."""
        offset: int | None = self._committed_offset[tp]
        return offset


class ChunkTransport(driver.Transport):
    """Faust's aiokafka transport with the chunked consumer."""

    Consumer = ChunkConsumer


class ChunkSchema(faust.Schema):
    """Hands a chunk on as it is: decoding belongs to the fold, where one bad record costs itself alone."""

    def compile(self, app: faust.App, **_: Any) -> Callable[..., Awaitable[Any]]:
        """Return the function that wraps a message in an event."""

        async def decode(message: Any, *, propagate: bool = False) -> Any:
            return app.create_event(None, message.value, message.headers, message)

        return decode


class ChunkApp(faust.App):
    """A Faust app whose topics are all consumed in chunks."""

    def _new_transport(self) -> ChunkTransport:
        return ChunkTransport(self.conf.broker_consumer, self, loop=self.loop)

    def _create_directories(self) -> None:
        """Make none: nothing is stored on disk, which may be read-only."""
