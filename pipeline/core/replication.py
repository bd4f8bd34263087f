"""On how many brokers each record of a topic is, and what would be lost with one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pipeline.errors import ConfigError

MIN_INSYNC: Final = "min.insync.replicas"
# With three replicas, of which two must have a record, the loss of one broker loses nothing and stops nothing.
SAFE_BROKERS: Final = 3
_SAFE_MIN_INSYNC: Final = 2
_FACTOR_SETTING: Final = "AGENT_METADATA_TOPIC_REPLICATION"
_MIN_INSYNC_SETTING: Final = "AGENT_METADATA_TOPIC_MIN_INSYNC_REPLICAS"


@dataclass(frozen=True)
class Risk:
    """What the loss of one broker would mean; no problem where the settings ask for it, or nothing else is possible."""

    text: str
    is_problem: bool


@dataclass(frozen=True)
class Replication:
    """A topic's replication factor and min.insync.replicas, as set; None: auto, as the cluster allows."""

    factor: int | None = None
    min_insync: int | None = None

    def check(self) -> None:
        """Refuse what no record could be written with.

        Raises:
            ValueError: more replicas must have a record than there are.
        """
        if (self.min_insync or 1) > (self.factor or SAFE_BROKERS):
            factor = self.factor or f"auto, at most {SAFE_BROKERS}"
            raise ValueError(
                f"{_MIN_INSYNC_SETTING}={self.min_insync} is more than {_FACTOR_SETTING} ({factor}): "
                f"nothing could be written"
            )

    def on(self, brokers: int) -> Replication:
        """Return what to create a topic with on a cluster of this size; None is then left to the brokers.

        Raises:
            ConfigError: the brokers' default may be too few for the min.insync.replicas that is set.
        """
        factor = self.factor or (SAFE_BROKERS if brokers >= SAFE_BROKERS else None)
        if factor is None and (self.min_insync or 1) > 1:
            raise ConfigError(
                f"{_MIN_INSYNC_SETTING}={self.min_insync} may be more than the brokers' own replication factor, "
                f"as there are fewer than {SAFE_BROKERS} brokers ({brokers}): set {_FACTOR_SETTING} too"
            )
        is_safe = factor is not None and factor >= SAFE_BROKERS
        return Replication(factor, self.min_insync or (_SAFE_MIN_INSYNC if is_safe else None))

    def differences(self, actual: Replication, brokers: int) -> list[tuple[str, str, str]]:
        """Return (field, declared, actual) where a topic differs; with auto, only if it has fewer than it should have.

        The least that auto accepts is a replica on each of up to three brokers, even where it left that to the brokers
        when the topic was created.
        """
        least = min(brokers, SAFE_BROKERS)
        is_safe = (self.factor or least) >= SAFE_BROKERS
        return [
            (field, str(declared) if declared else f"{least} or more (auto)", str(found))
            for field, declared, least, found in (
                ("replication", self.factor, least, actual.factor),
                (MIN_INSYNC, self.min_insync, _SAFE_MIN_INSYNC if is_safe else 1, actual.min_insync),
            )
            if found is not None and (found != declared if declared else found < least)
        ]

    def risk(self, topic: str, actual: Replication, brokers: int) -> Risk | None:
        """Return what is at risk in a topic on a cluster of more than one broker; None if nothing is."""
        if actual.factor == 1 and brokers > 1:
            return Risk(
                f"{topic} is lost with one broker, as its replication factor is 1: "
                f"raise it to {min(brokers, SAFE_BROKERS)} (kafka-reassign-partitions.sh)",
                is_problem=self.factor != 1,
            )
        if actual.min_insync == 1 and brokers >= SAFE_BROKERS:
            return Risk(
                f"{topic} may lose acknowledged records with one broker, as its {MIN_INSYNC} is 1: "
                f"raise it to {_SAFE_MIN_INSYNC} (kafka-configs.sh)",
                is_problem=self.min_insync != 1 and (self.factor or SAFE_BROKERS) >= SAFE_BROKERS,
            )
        return None
