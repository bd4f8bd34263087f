"""The commands of the previous version, which today's has to work beside: `-m` this instead of pipeline.

Its files come from the repository's history, and run with the libraries of today's environment. With each release,
PREVIOUS moves to the one before it.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path

PREVIOUS = "bab0159629d81cb9bbbc2f7ced1c274894d226e4"
MODULE = ("tests.support.previous_version",)

_ROOT = Path(__file__).parents[2]
_FOLDERS = ("pipeline", "sql", "topics")


def previous_version() -> Path:
    """Return the folder with the previous version's files, which the first call exports.

    Raises: AssertionError, if the history lacks it.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agent-metadata-pipeline"
    folder = caches / PREVIOUS
    if not folder.exists():
        if _git("cat-file", "-e", PREVIOUS).returncode != 0:  # a shallow clone
            _git("fetch", "--quiet", "--depth", "1", "origin", PREVIOUS)
        archive = _git("archive", PREVIOUS, *_FOLDERS)
        assert archive.returncode == 0, (
            f"neither the history here nor its origin has {PREVIOUS}, the previous version: run "
            f"`git fetch --unshallow`, or have CI check out all of it; git says: {archive.stderr.decode().strip()}"
        )
        caches.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=caches) as draft,
            tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files,
        ):
            files.extractall(f"{draft}/whole", filter="data")
            with suppress(OSError):  # another process was faster
                os.rename(f"{draft}/whole", folder)
    return folder


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True)


def main() -> None:
    sys.path.insert(0, str(previous_version()))
    assert "pipeline" not in sys.modules
    from pipeline import cli

    assert Path(cli.__file__).is_relative_to(previous_version()), cli.__file__
    cli.main()


if __name__ == "__main__":
    main()
