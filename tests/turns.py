"""Who may run beside whom, where several processes share the tests (`pytest -n 2`): what measures time runs alone.

A test takes its turn from the locks of two files, shared with the tests of other processes, or for itself alone. The
lock at the door is held by who waits: nobody slips past a test that wants the machine for itself.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DOOR, ROOM = Path(__file__), Path(__file__).with_name("conftest.py")  # files that are always there, and never changed


@contextmanager
def turn(alone: bool) -> Iterator[None]:
    """Waits for the others to finish where `alone`, and keeps them waiting; else only for somebody who is alone."""
    with ROOM.open() as room:
        with _locked(DOOR):
            fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        try:
            yield
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)  # said, not left to closing: a forked process has the file open too


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
