"""Which PostgreSQL a local one is: the wheel's, or that of a folder which PIPELINE_POSTGRES names."""

import re

import pytest

from pipeline.errors import ConfigError
from pipeline.local.postgres import postgres_binaries, postgres_version


def test_wheel_has_the_server_if_no_folder_is_named(monkeypatch):
    monkeypatch.delenv("PIPELINE_POSTGRES", raising=False)
    assert re.fullmatch(r"\d+\.\d+", postgres_version(postgres_binaries()))


def test_named_folder_is_taken(monkeypatch, tmp_path):
    for program in ("postgres", "initdb"):
        (tmp_path / program).write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)'\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PIPELINE_POSTGRES", str(tmp_path))
    assert postgres_binaries() == tmp_path
    assert postgres_version(tmp_path) == "15.18"


def test_named_folder_without_a_server_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PIPELINE_POSTGRES", str(tmp_path))
    with pytest.raises(ConfigError, match=f"PIPELINE_POSTGRES={tmp_path}: there is no postgres and initdb"):
        postgres_binaries()
