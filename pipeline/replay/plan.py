"""The file an interrupted replay resumes from: what was asked for, and which partitions are done."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Final

import msgspec

from pipeline.errors import ConfigError
from pipeline.kafka.range_reader import OffsetRange
from pipeline.replay.folds import ReplaySource
from pipeline.replay.replay import PairFilter, Summary

_VERSION: Final = 1


class ReplayPlan(msgspec.Struct):
    """A replay with its offsets fixed, so that a second run reads what the first would have read.

    `end` None: the topic's end when the replay began. `done` holds partitions.
    """

    source: ReplaySource
    topic: str
    topic_id: str
    start: datetime
    end: datetime | None
    agent_ids: list[str]
    keys: list[str]
    ranges: list[OffsetRange]
    done: list[int] = []
    summary: Summary = msgspec.field(default_factory=Summary)
    version: int = _VERSION

    @property
    def only(self) -> PairFilter:
        """Which pairs to replay."""
        return PairFilter(frozenset(self.agent_ids), frozenset(self.keys))

    @property
    def left(self) -> list[OffsetRange]:
        """The ranges of the partitions that are not done."""
        return [offsets for offsets in self.ranges if offsets.partition not in self.done]


def save_plan(plan: ReplayPlan, file: Path) -> None:
    """Write the file, atomically.

    Raises:
        ConfigError: the file can't be written.
    """
    draft = file.with_name(f"{file.name}.new")
    try:
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(plan), indent=2) + b"\n")
        os.replace(draft, file)
    except OSError as error:
        raise ConfigError(f"--resume {file} can't be written: {error.strerror}") from None


def load_plan(file: Path) -> ReplayPlan | None:
    """Read the file; None if there is none.

    Raises:
        ConfigError: the file can't be read, or is not a replay's.
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
        raise ConfigError(f"--resume {file} has version {plan.version}; this program reads version {_VERSION}")
    return plan
