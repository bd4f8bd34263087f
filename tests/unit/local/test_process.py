"""Ports, and the life of a local server, with a program that does nothing."""

import os
import signal
import socket
import sys

import pytest

from pipeline.errors import ServiceUnavailable
from pipeline.local.process import LOOPBACK, ChildProcess, LocalServer, free_port


class Sleeper(LocalServer):
    name = "the sleeper"
    start_seconds = 30.0
    program = "import time, sys; print('up', flush=True); time.sleep(600)"

    def __init__(self):
        super().__init__("sleeper")

    def _launch(self):
        self.log_path.unlink(missing_ok=True)
        return ChildProcess(self.name, [sys.executable, "-c", self.program], log_path=self.log_path)

    def _is_ready(self):
        return "up" in self.log_path.read_text()


class Failing(Sleeper):
    program = "raise SystemExit('no such luck')"


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_ports_in_a_row_are_all_free():
    first = free_port(3)
    for port in range(first, first + 3):
        with socket.socket() as probe:
            probe.bind((LOOPBACK, port))


def test_port_that_is_taken_is_not_free(monkeypatch):
    port = free_port()
    with socket.socket() as taken:
        taken.bind((LOOPBACK, port))
        taken.listen()
        monkeypatch.setattr("pipeline.local.process._PORTS", range(port, port + 1))
        with pytest.raises(ServiceUnavailable, match="no free TCP port"):
            free_port()


def test_server_has_no_pid_before_its_start():
    server = Sleeper()
    try:
        with pytest.raises(ServiceUnavailable, match="the sleeper was not started"):
            _ = server.pid
    finally:
        server.close()


def test_start_of_a_running_server_changes_nothing():
    with Sleeper() as server:
        pid = server.pid
        server.start()
        assert server.pid == pid


@pytest.mark.parametrize("end", [Sleeper.stop, Sleeper.kill, lambda _: None], ids=["stop", "kill", "running"])
def test_restart_replaces_the_process_however_it_ended(end):
    with Sleeper() as server:
        pid = server.pid
        end(server)
        server.restart()
        assert server.pid != pid
        assert is_running(server.pid)
        assert not is_running(pid)


def test_end_of_the_context_leaves_no_process_and_no_folder():
    with Sleeper() as server:
        pid, folder = server.pid, server.log_path.parent
    assert not is_running(pid)
    assert not folder.exists()
    server.close()  # harmless to repeat


def test_server_that_ends_at_its_start_says_why_and_leaves_no_folder():
    server = Failing()
    with pytest.raises(ServiceUnavailable, match="the sleeper exited with code 1 while starting: no such luck"), server:
        pass
    assert not server.log_path.parent.exists()


def test_process_that_ignores_a_signal_is_killed(tmp_path):
    program = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    log = tmp_path / "log"
    child = ChildProcess("stubborn", [sys.executable, "-c", program], log_path=log)
    child.wait_ready(lambda: "up" in log.read_text(), 30)
    child.stop(signal.SIGTERM, 0.2)
    assert not child.is_running
