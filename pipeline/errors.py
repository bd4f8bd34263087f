"""What went wrong, as types that say what the caller does next."""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """What a command ends with; a process that a signal ended has 128 + the signal's number."""

    OK = 0
    FAILURE = 1
    """Something failed, or was found to be wrong: see the message."""
    USAGE = 2
    """The command line or a setting is wrong: nothing was started, and starting it again won't help."""
    INTERRUPTED = 130
    """Ctrl-C."""


class PipelineError(Exception):
    """Base of every error this package raises on purpose.

    The message says what happened and what to do about it, in one line, without secrets.
    """

    retriable: ClassVar[bool] = False


class ConfigError(PipelineError):
    """A setting is wrong: change it and start again; nothing was started."""


class TopicMismatch(PipelineError):
    """The cluster's topics are missing or disagree with what is declared: refuse to run until they are made to fit."""


class SchemaMismatch(PipelineError):
    """The database lacks tables or migrations: refuse to run until `agent-metadata db migrate` has."""


class DecodeError(PipelineError):
    """A record can't be read: dead-letter it with this reason; another try would end the same way."""


class ServiceUnavailable(PipelineError):
    """Kafka or Postgres is away or busy: keep what you have, wait, try again."""

    retriable: ClassVar[bool] = True
    unpublished: int = 0  # NOTIFY payloads that Postgres had taken before it failed; another try sends them again


class RowRejected(PipelineError):
    """Postgres refused the data itself: bisect, dead-letter the one row, write the rest."""

    def __init__(self, message: str, *, sqlstate: str | None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


class ProgressGap(PipelineError):
    """Records before these are not applied: go back to `expected`, unless they exist no more."""

    def __init__(self, expected: int, got: int) -> None:
        super().__init__(f"the next offset to apply is {expected}, but the records begin at {got}")
        self.expected = expected
