"""Temporary folders that are removed even if their owner is killed: then when the next one is created."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "agent-metadata-"
_LOCK = ".owner"


class ThrowawayFolder:
    """A folder in the system's temporary one, locked by this process as long as it is needed."""

    def __init__(self, purpose: str) -> None:
        remove_orphans()
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{purpose}-"))
        # Locked before it has the name that remove_orphans() looks for; the kernel releases the lock when this
        # process ends.
        draft = self.path / f"{_LOCK}.draft"
        self._lock = draft.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        draft.rename(self.path / _LOCK)

    def remove(self) -> None:
        """Remove the folder and all in it; calling it again does nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def remove_orphans() -> None:
    """Remove the folders that processes of this user left behind when they were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            with (folder / _LOCK).open("r+") as lock:
                if folder.is_symlink() or os.fstat(lock.fileno()).st_uid != os.geteuid():
                    continue
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # of another user, not ready, removed meanwhile, or in use
            continue
