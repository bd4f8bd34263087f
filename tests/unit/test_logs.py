"""What the log shows, and what it must not."""

import logging

import pytest
import structlog

from pipeline.logs import configure_logging


@pytest.fixture(autouse=True)
def _logging_as_before():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    for name in ("asyncpg", "pipeline", "pipeline.chunks", "pipeline.latest"):
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
