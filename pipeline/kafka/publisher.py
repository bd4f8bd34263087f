"""An asyncio producer for batches and dead letters, over confluent-kafka's: few records, large ones."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from pipeline.errors import PipelineError
from pipeline.kafka.errors import log_unavailable

# For whatever is keyed by agent: Java's default for keyed records, so that an agent's records from any client share a
# partition.
PARTITIONER: Final = "murmur2"
_POLL_SECONDS: Final = 0.1
_FULL_QUEUE_PAUSE_SECONDS: Final = 0.02
# A dead letter is as large as its record, which may have arrived compressed: the broker decides what is too large.
_MAX_RECORD_BYTES: Final = 100_000_000
# Windows bound what waits for acknowledgements; this only keeps librdkafka from refusing records before that.
_MAX_QUEUED_KBYTES: Final = 262_144


class Publisher:
    """Sends records with acks=all, idempotently, in order per partition.

    Guarantee: records are retried for as long as it takes; an outage delays acknowledgements and loses nothing.
    """

    def __init__(self, client_config: Mapping[str, Any]) -> None:
        self._producer = Producer(
            {
                **client_config,
                "enable.idempotence": True,
                "compression.type": "lz4",
                "linger.ms": 5,
                "message.timeout.ms": 0,  # never give up on a record
                "message.max.bytes": _MAX_RECORD_BYTES,
                "queue.buffering.max.kbytes": _MAX_QUEUED_KBYTES,
                "error_cb": log_unavailable,
            }
        )
        self._loop = asyncio.get_running_loop()
        self._waiting: set[asyncio.Future[None]] = set()  # touched on the event loop only
        self._failure: PipelineError | None = None
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="publisher-poll", daemon=True)
        self._thread.start()

    async def send(
        self,
        topic: str,
        value: bytes | None,
        *,
        partition: int = -1,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> asyncio.Future[None]:
        """Queue a record; the future is done when Kafka has acknowledged it.

        Raises:
            PipelineError: Kafka refuses this record, or this producer, for good; from the future as well.
        """
        if self._failure is not None:
            raise self._failure
        acknowledged: asyncio.Future[None] = self._loop.create_future()
        self._waiting.add(acknowledged)
        acknowledged.add_done_callback(self._waiting.discard)

        def on_delivery(error: KafkaError | None, _message: Message) -> None:
            self._loop.call_soon_threadsafe(_settle, acknowledged, error, topic)

        while True:
            try:
                self._producer.produce(
                    topic,
                    value,
                    key,
                    partition,
                    on_delivery=on_delivery,
                    headers=list(headers),
                )
            except BufferError:
                await asyncio.sleep(_FULL_QUEUE_PAUSE_SECONDS)
            except KafkaException as error:
                _settle(acknowledged, error.args[0], topic)
                return acknowledged
            else:
                return acknowledged

    async def close(self, timeout_seconds: float) -> int:
        """Flush; return how many records are still not acknowledged."""
        left: int = await asyncio.to_thread(self._producer.flush, timeout_seconds)
        self._is_closing.set()
        await asyncio.to_thread(self._thread.join)
        return left

    def _poll(self) -> None:
        try:
            while not self._is_closing.is_set():
                self._producer.poll(_POLL_SECONDS)
        except KafkaException as error:  # fatal: no more deliveries are reported
            self._loop.call_soon_threadsafe(self._fail, error.args[0])

    def _fail(self, error: KafkaError) -> None:
        self._failure = PipelineError(f"Kafka refuses this producer for good: {error.str()}; restart the process")
        for acknowledged in list(self._waiting):
            if not acknowledged.done():
                acknowledged.set_exception(self._failure)


def _settle(acknowledged: asyncio.Future[None], error: KafkaError | None, topic: str) -> None:
    if acknowledged.done():
        return
    if error is None:
        acknowledged.set_result(None)
    else:
        acknowledged.set_exception(PipelineError(f"Kafka refused a record for {topic}: {error.str()}"))
