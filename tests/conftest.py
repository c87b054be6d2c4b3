"""No test leaves this machine: the guard of tests/offline holds here and in every process that a test starts."""

import os
import runpy
from pathlib import Path

OFFLINE = Path(__file__).parent / "offline"

runpy.run_path(str(OFFLINE / "sitecustomize.py"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")]))
os.environ["GIT_ALLOW_PROTOCOL"] = "file"  # git is not Python: it is told so itself
