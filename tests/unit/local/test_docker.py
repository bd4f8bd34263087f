import gc

import pytest

from pipeline.local import docker_answers


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_asking_an_engine_that_is_not_there_leaves_no_socket_open(monkeypatch, tmp_path):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    assert not docker_answers()
    gc.collect()  # a socket left open would fail this test, or any later one
