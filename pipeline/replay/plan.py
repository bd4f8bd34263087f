"""The file that an interrupted replay goes on from: what was asked for, and which partitions are done."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Final

import msgspec

from pipeline.errors import ConfigError
from pipeline.replay.replay import Filter, ReplaySource, Summary

_VERSION: Final = 1


class Range(msgspec.Struct, frozen=True):
    """Offsets `start` up to, not including, `end` of a partition."""

    partition: int
    start: int
    end: int


class ReplayPlan(msgspec.Struct):
    """A replay with its offsets fixed, so that a second run reads what the first would have read.

    `end` None: the topic's end when it began.
    """

    source: ReplaySource
    topic: str
    topic_id: str
    start: datetime
    end: datetime | None
    agent_ids: list[str]
    keys: list[str]
    ranges: list[Range]
    done: list[int] = []
    summary: Summary = msgspec.field(default_factory=Summary)
    version: int = _VERSION

    @property
    def only(self) -> Filter:
        """Which pairs are asked for."""
        return Filter(frozenset(self.agent_ids), frozenset(self.keys))

    @property
    def left(self) -> list[Range]:
        """The partitions that are still to be replayed."""
        return [item for item in self.ranges if item.partition not in self.done]


def save_plan(plan: ReplayPlan, file: Path) -> None:
    """Write the file, whole or not at all.

    Raises:
        ConfigError: it can't be written there.
    """
    beside = file.with_name(f"{file.name}.new")
    try:
        beside.write_bytes(msgspec.json.format(msgspec.json.encode(plan), indent=2) + b"\n")
        os.replace(beside, file)
    except OSError as error:
        raise ConfigError(f"--resume {file} can't be written: {error.strerror}") from None


def load_plan(file: Path) -> ReplayPlan | None:
    """Read the file; None if there is none.

    Raises:
        ConfigError: it can't be read, or is no such file.
    """
    try:
        plan = msgspec.json.decode(file.read_bytes(), type=ReplayPlan)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"--resume {file} can't be read: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"--resume {file} is not the file of a replay: {error}") from None
    if plan.version != _VERSION:
        raise ConfigError(f"--resume {file} is of version {plan.version}; this program writes {_VERSION}")
    return plan
