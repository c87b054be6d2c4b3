"""What must stand before the first test is read, and before each.

No test leaves this machine: the guard of tests/offline holds here and in every process that a test starts. And without
a GPU Triton interprets its kernels, which it decides when any part of it is first imported. Where processes share the
tests, each computes on one core, and a test that is marked `alone` has the machine for itself (turns.py).
"""

import os
import runpy
from pathlib import Path

import pytest
import torch
from turns import turn

OFFLINE = Path(__file__).parent / "offline"

runpy.run_path(str(OFFLINE / "sitecustomize.py"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")]))
os.environ["GIT_ALLOW_PROTOCOL"] = "file"  # git is not Python: it is told so itself

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED, THREADS = "PYTEST_XDIST_WORKER" in os.environ, torch.get_num_threads()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    alone = item.get_closest_marker("alone") is not None
    with turn(alone):
        torch.set_num_threads(THREADS if alone or not SHARED else 1)
        return (yield)
