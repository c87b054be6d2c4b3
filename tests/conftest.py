"""What must stand before the first test is read.

No test leaves this machine: the guard of tests/offline holds here and in every process that a test starts. And without
a GPU Triton interprets its kernels, which it decides when any part of it is first imported.
"""

import os
import runpy
from pathlib import Path

import torch

OFFLINE = Path(__file__).parent / "offline"

runpy.run_path(str(OFFLINE / "sitecustomize.py"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")]))
os.environ["GIT_ALLOW_PROTOCOL"] = "file"  # git is not Python: it is told so itself

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
