"""Run a command that the kernel signals when its parent process ends.

Run as a script, never imported: `end_with_parent.py PARENT_PID SIGNAL USER COMMAND...`; see child_command(). A program
of its own, unlike a hook between fork and exec, is safe in a parent that has threads.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(parent_pid: int, death_signal: int, user: str, command: list[str]) -> None:
    """Become `command`, as `user` unless that is empty; the process id stays the same."""
    if user:
        entry = pwd.getpwnam(user)
        os.setgroups([])
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
        os.environ["HOME"] = entry.pw_dir
    # After setuid, which would clear it; exec keeps it.
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, death_signal)
    if os.getppid() != parent_pid:  # the parent ended before prctl took effect
        sys.exit("the parent process has ended")
    os.execv(command[0], command)  # noqa: S606 - replacing this process is the purpose


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
