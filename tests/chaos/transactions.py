"""Reports in Kafka transactions, of which some are aborted."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, Final

from confluent_kafka import KafkaException, Producer

ABORTED: Final = "aborted"  # values of reports of a transaction that will be aborted end with it
_LONGEST_SECONDS: Final = 1.0
_ABORTED_SHARE: Final = 0.3
_ANSWER_SECONDS: Final = 10.0


class TransactionalProducer:
    """Produces in one transaction after another, each open for up to a second; waits out any outage.

    What `produce` is given counts once `on_commit` is called with it; what is aborted never does, whether by chance or
    because Kafka or the client gave the transaction up.
    """

    def __init__(self, config: dict[str, Any], dice: random.Random, on_commit: Callable[[dict[int, Any]], None]):
        self._producer = Producer(config)
        self._dice = dice
        self._on_commit = on_commit
        self._delivered: dict[int, Any] = {}
        self._ends_at = 0.0
        self.is_doomed = False
        self._has_begun = False
        self._insist(lambda: self._producer.init_transactions(_ANSWER_SECONDS))

    def begin(self) -> None:
        """Begin a transaction, unless one is open; `is_doomed` tells how it will end."""
        if not self._has_begun:
            self._producer.begin_transaction()
            self._has_begun = True
            self._ends_at = time.monotonic() + self._dice.uniform(0.0, _LONGEST_SECONDS)
            self.is_doomed = self._dice.random() < _ABORTED_SHARE

    def produce(self, topic: str, value: bytes, key: str, accepted: Callable[[Any], tuple[int, Any]]) -> None:
        """Produce in the open transaction; `accepted` makes what is kept, with its number, of a message."""

        def delivered(problem: Any, message: Any) -> None:
            if problem is None:
                number, kept = accepted(message)
                self._delivered[number] = kept

        try:
            self._producer.produce(topic, value, key, on_delivery=delivered)
        except KafkaException:  # the transaction has failed already
            self.is_doomed = True

    def end_when_due(self) -> None:
        """End the transaction if its time has come."""
        self._producer.poll(0)
        if time.monotonic() >= self._ends_at:
            self.end()

    def end(self) -> None:
        """End the open transaction, if there is one."""
        if not self._has_begun:
            return
        if not self.is_doomed and self._insist(lambda: self._producer.commit_transaction(_ANSWER_SECONDS)):
            self._on_commit(self._delivered)
        else:
            self._insist(lambda: self._producer.abort_transaction(_ANSWER_SECONDS))
        self._delivered = {}
        self._has_begun = False

    def _insist(self, request: Callable[[], None]) -> bool:
        """Repeat a request that Kafka did not answer; false if the transaction has to be aborted.

        Any other refusal ends the load, and so fails the run.
        """
        while True:
            try:
                request()
            except KafkaException as error:
                if error.args[0].txn_requires_abort():
                    return False
                if not error.args[0].retriable():
                    raise
            else:
                return True
