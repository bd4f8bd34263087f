"""What went wrong, as types that say what the caller should do next; and how long a service may take to answer."""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar, Final

# How long a service may take to answer a request before it counts as unavailable; a healthy one needs milliseconds.
ANSWER_SECONDS: Final = 10.0


class ExitCode(IntEnum):
    """A command's exit code; for a process ended by a signal it is 128 + the signal's number."""

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
    """A setting, password or right is wrong: change it and start again. A running sink holds back and tries again."""


class TopicMismatch(PipelineError):
    """The cluster's topics are missing or differ from their declarations: refuse to run until they match."""


class SchemaMismatch(PipelineError):
    """The database lacks tables or migrations: refuse to run until `agent-metadata db migrate` has run."""


class DecodeError(PipelineError):
    """Bytes can't be decoded: dead-letter the record with this reason, ignore the NOTIFY; a retry would fail again."""


class NewerVersion(PipelineError):
    """A record is of a version that came after this program: apply nothing behind it, and have the program upgraded."""


class ServiceUnavailable(PipelineError):
    """Kafka or Postgres is unavailable or busy: keep what you have, wait, try again."""

    retriable: ClassVar[bool] = True


class FlushFailed(ServiceUnavailable):
    """A transaction was rolled back, with this number of NOTIFY payloads in it: try again, and they are sent then."""

    def __init__(self, message: str, *, payloads: int) -> None:
        super().__init__(message)
        self.payloads = payloads


class RowRejected(PipelineError):
    """Postgres refused the data itself: bisect, dead-letter the one row, write the rest."""

    def __init__(self, message: str, *, sqlstate: str | None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


class ProgressGap(PipelineError):
    """Records before these are not applied yet: go back to `expected`, unless they no longer exist."""

    def __init__(self, expected: int, got: int) -> None:
        super().__init__(f"the next offset to apply is {expected}, but the records begin at {got}")
        self.expected = expected
