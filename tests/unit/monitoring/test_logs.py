"""What the log shows, and what it must not."""

import logging

import pytest
import structlog

from pipeline.monitoring.logs import RepeatFilter, configure_logging


@pytest.fixture(autouse=True)
def _logging_as_before():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    for name in ("asyncpg", "pipeline"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    structlog.reset_defaults()


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_traceback_shows_no_local_variables(capsys, log_format):
    configure_logging(log_format)
    password = "-".join(("hunter", "2"))  # in two parts: the source line is a part of the traceback
    try:
        raise OSError(len(password))
    except OSError:
        logging.getLogger("library").warning("it failed", exc_info=True)
    shown = capsys.readouterr().err
    assert "OSError" in shown
    assert "hunter-2" not in shown


def test_asyncpg_pool_that_tries_again_is_not_told_twice(capsys):
    configure_logging("console")
    logging.getLogger("asyncpg.pool").warning("Failed to restore the pool connection floor; retrying")
    assert capsys.readouterr().err == ""


def warning(name, text):
    return logging.LogRecord(name, logging.WARNING, __file__, 1, text, None, None)


def test_library_that_repeats_itself_is_shown_once_in_ten_seconds():
    now = [100.0]
    repeats = RepeatFilter(lambda: now[0])
    shown = []
    for now[0] in (100.0, 100.5, 109.0, 110.0, 111.0):
        shown.append(repeats.filter(warning("librdkafka", f"connect failed after {now[0]} ms")))
    assert shown == [True, False, False, True, False]


def test_library_that_says_something_else_is_shown():
    repeats = RepeatFilter(iter((100.0, 100.1)).__next__)
    assert repeats.filter(warning("librdkafka", "connect failed"))
    assert repeats.filter(warning("librdkafka", "fenced"))


def test_own_warning_is_shown_each_time_but_for_handed_on_complaints(capsys):
    configure_logging("console")
    log = structlog.get_logger("pipeline.kafka.publisher")
    for _ in range(3):
        log.warning("role_ended")
        log.warning("kafka_unavailable", error="1/1 brokers are down")
    shown = capsys.readouterr().err
    assert (shown.count("role_ended"), shown.count("kafka_unavailable")) == (3, 1)


HOSTILE = "\x1b]0;title\x07\u202e\x9b31m\ud800\r\n2024-01-01 forged"
ESCAPED = r"\x1b]0;title\x07\u202e\x9b31m\ud800\r\n2024-01-01 forged"


def lines_of(capsys, log_format, log):
    """Return what is logged, by line, after checking that no character of it is one that a terminal obeys."""
    configure_logging(log_format)
    log()
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if not line.isprintable()] == []
    return lines


@pytest.mark.parametrize("log_format", ["console", "json"])
@pytest.mark.parametrize("text", [HOSTILE, HOSTILE.replace(" ", "")], ids=["words", "one-word"])
def test_fields_and_event_can_not_reach_the_terminal(capsys, log_format, text):
    log = structlog.get_logger("pipeline.sink.sink")
    (line,) = lines_of(capsys, log_format, lambda: log.warning(text, key=text, keys=[text]))
    assert r"forged" in line


def test_event_is_shown_escaped(capsys):
    log = structlog.get_logger("pipeline.sink.sink")
    (line,) = lines_of(capsys, "console", lambda: log.warning(HOSTILE, key="\x1b[31m"))
    assert ESCAPED in line
    assert r"key=\x1b[31m" in line


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_message_of_a_library_can_not_reach_the_terminal(capsys, log_format):
    (line,) = lines_of(capsys, log_format, lambda: logging.getLogger("library").warning("got %s", HOSTILE))
    assert "forged" in line


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_error_in_a_traceback_can_not_reach_the_terminal(capsys, log_format):
    def log():
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            logging.getLogger("library").warning("it failed", exc_info=True)

    assert "Traceback" in "".join(lines_of(capsys, log_format, log))
