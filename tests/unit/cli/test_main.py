"""The command line without services: help, usage errors, and servers that do not answer."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

COMMANDS = [
    *[[name] for name in ("worker", "sink", "run", "serve", "watch", "produce", "map", "demo", "config")],
    *[[name] for name in ("replay", "refill", "status", "why")],
    *[["shadow"], ["shadow", "diff"], *[["dead-letter", name] for name in ("list", "show", "redrive")]],
    *[["topics"], ["topics", "create"], ["topics", "diff"], ["db"], ["db", "migrate"], ["db", "status"]],
]
NEEDING_KAFKA = [["worker"], ["sink"], ["produce"], ["topics", "diff"]]
NOBODY = "127.0.0.1:1"
# A quiet machine needs 10 s: 8 s of waiting for Kafka, and Python. A loaded one takes long to start Python.
GIVES_UP_SECONDS = 40


def agent_metadata(*arguments, **variables):
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("KAFKA_BOOTSTRAP_SERVERS", "DATABASE_URL") and not name.startswith("AGENT_METADATA_")
    }
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        env={**environment, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def complaint(done):
    """Return the one line on stderr."""
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("agent-metadata: ")
    return line


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_help_of_a_command_says_what_it_does(command):
    done = agent_metadata(*command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage:" in done.stdout
    assert len(done.stdout.splitlines()) > 5
    assert "<bool>" not in done.stdout  # a flag takes no value


def test_help_names_every_command():
    text = agent_metadata("--help").stdout
    assert [command[0] for command in COMMANDS if command[0] not in text] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["db", "nonsense"],
        ["db", "status", "extra"],
        ["worker", "--nonsense"],
        ["produce", "--agents", "0"],
    ],
    ids=" ".join,
)
def test_usage_error_exits_with_2(arguments):
    done = agent_metadata(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage:" in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_setting_exits_with_2_and_names_it():
    done = agent_metadata("worker", AGENT_METADATA_PARTITIONS="0")
    assert done.returncode == 2
    assert "AGENT_METADATA_PARTITIONS='0'" in complaint(done)


def test_demo_with_a_wrong_setting_says_so_before_it_starts_anything():
    done = agent_metadata("demo", AGENT_METADATA_WINDOW_SECOND="1")
    assert done.returncode == 2
    assert "did you mean AGENT_METADATA_WINDOW_SECONDS?" in complaint(done)


def test_watch_of_what_is_too_long_for_an_agent_exits_with_2_and_shows_it():
    done = agent_metadata("watch", "host" * 64)
    assert done.returncode == 2
    assert "hosthost" in complaint(done)


@pytest.fixture(scope="module")
def without_a_broker():
    """How commands that need Kafka end, by command; they run at the same time, as each gives up after 8 s."""

    def timed(command):
        started = time.monotonic()
        return agent_metadata(*command, KAFKA_BOOTSTRAP_SERVERS=NOBODY), time.monotonic() - started

    with ThreadPoolExecutor() as threads:
        ended = threads.map(timed, NEEDING_KAFKA)
    return dict(zip(map(tuple, NEEDING_KAFKA), ended, strict=True))


@pytest.mark.parametrize("command", NEEDING_KAFKA, ids=" ".join)
def test_broker_that_is_not_there_exits_with_1_in_time_and_says_what_to_do(without_a_broker, command):
    done, seconds = without_a_broker[tuple(command)]
    assert (done.returncode, seconds < GIVES_UP_SECONDS) == (1, True)
    message = complaint(done)
    assert f"Kafka at {NOBODY} can't be reached" in message
    assert "Connection refused" in message
    assert "is it up, and is the address right?" in message


@pytest.mark.parametrize("command", [["db", "status"], ["db", "migrate"], ["watch"]], ids=" ".join)
def test_database_that_is_not_there_exits_with_1_and_says_what_to_do(command):
    done = agent_metadata(*command, DATABASE_URL=f"postgresql://u:secret@{NOBODY}/d")
    assert done.returncode == 1
    message = complaint(done)
    assert "is it up, and is DATABASE_URL right?" in message
    assert "secret" not in message


BRIDGED = {"AGENT_METADATA_BRIDGE_DATABASE_URL": f"postgresql://u:secret@{NOBODY}/coder"}


def test_bridge_without_coders_database_exits_with_2_and_names_the_setting():
    done = agent_metadata("bridge")
    assert done.returncode == 2
    assert "AGENT_METADATA_BRIDGE_DATABASE_URL is not set" in complaint(done)


def test_bridge_whose_database_is_not_there_exits_with_1_and_names_the_setting():
    done = agent_metadata("bridge", **BRIDGED)
    assert done.returncode == 1
    message = complaint(done)
    assert "is it up, and is AGENT_METADATA_BRIDGE_DATABASE_URL right?" in message
    assert "secret" not in message


@pytest.mark.parametrize(
    "settings",
    [{"AGENT_METADATA_EVENTS_FORMAT": "otlp_json"}, {"AGENT_METADATA_MAPPING": '{"id": "host", "entries": "values"}'}],
    ids=["otlp", "mapping"],
)
@pytest.mark.parametrize(
    ("command", "subject"),
    [
        (["bridge"], "the bridge produces reports in our own format"),
        (["produce"], "this command produces reports in our own format"),
        (["dead-letter", "redrive", "--all"], "a redrive produces reports in our own format"),
    ],
    ids=["bridge", "produce", "redrive"],
)
def test_reports_of_our_own_are_not_written_to_a_topic_of_another_format(settings, command, subject):
    done = agent_metadata(*command, **settings)
    assert done.returncode == 2
    (setting,) = settings
    assert subject in complaint(done)
    assert setting in complaint(done)


@pytest.mark.parametrize(
    "url",
    [
        "mysql://u:secret@host/d",
        "postgresql://u:secret@host:port/d",
        "postgresql://u:sec/secret@host/d",  # a slash that should have been %2F: Python's error quotes what is before
        "postgresql://u:secret@[::1/d",
        f"postgresql://u:secret@{NOBODY}/d?sslmode=nonsense",
    ],
)
def test_database_url_that_is_none_exits_with_2_and_does_not_show_the_password(url):
    done = agent_metadata("db", "status", DATABASE_URL=url)
    assert done.returncode == 2
    message = complaint(done)
    assert "DATABASE_URL" in message
    assert "sec" not in message


HOSTILE = "é\x1b]0;title\x07\u202e\udcff[red]:rocket:\nagent-metadata: forged"


@pytest.mark.parametrize(
    ("encoding", "command"),
    [
        ("utf-8", ["watch", HOSTILE * 8]),
        ("ascii", ["dead-letter", "list", "--stage", HOSTILE]),
        ("latin-1", ["dead-letter", "show", HOSTILE]),
        ("cp437", ["replay", "--from", HOSTILE]),
        ("ascii", ["why", HOSTILE * 8, "cpu"]),
        ("utf-8", ["status", "--metrics", HOSTILE]),
    ],
    ids=["watch", "list", "show", "replay", "why", "status"],
)
def test_error_is_one_line_that_a_terminal_does_not_obey(encoding, command):
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *as_bytes(command)],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, b"")
    (line,) = done.stderr.decode(encoding).splitlines()
    assert line.startswith("agent-metadata: ")
    assert line.isprintable()
    assert r"\x1b]0;title\x07\u202e" in line
    assert "[red]:rocket:" in line


def as_bytes(command):
    """Encode arguments; a byte that is no UTF-8 is what becomes a lone surrogate in an argument."""
    return [part.encode(errors="surrogateescape") for part in command]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_config_is_shown_on_any_terminal(encoding):
    settings = {"AGENT_METADATA_KAFKA_SASL_USERNAME": "é日\x1b[31m\u202e", "PYTHONIOENCODING": encoding}
    settings |= {"AGENT_METADATA_KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT"}
    settings |= {"AGENT_METADATA_KAFKA_SASL_MECHANISM": "PLAIN", "AGENT_METADATA_KAFKA_SASL_PASSWORD": "p"}
    for arguments in (["config"], ["config", "--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *arguments],
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        text = done.stdout.decode(encoding)
        assert [line for line in text.splitlines() if not line.isprintable()] == []
    assert json.loads(text)["AGENT_METADATA_KAFKA_SASL_USERNAME"]["value"] == "é日\x1b[31m\u202e"
