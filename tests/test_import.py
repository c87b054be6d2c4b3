"""`import karat_lite` is quick and brings nothing heavy: what draws or reads pictures comes when it is used."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import karat_lite as kl

ROOT = Path(__file__).resolve().parent.parent
TIMED = """
import json, sys, time
import torch
start = time.perf_counter()
import karat_lite
print(json.dumps([time.perf_counter() - start, sorted({name.split(".")[0] for name in sys.modules})]))
"""


def child(code):
    """What a new Python process prints."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.alone
def test_import_is_quick_and_light():
    runs = [json.loads(child(TIMED)) for _ in range(3)]
    assert statistics.median(seconds for seconds, _ in runs) <= 0.5
    assert set(runs[0][1]).isdisjoint({"torchvision", "timm", "sklearn", "PIL", "matplotlib", "ipywidgets", "IPython"})


def test_the_command_line_module_hides_nothing():
    """`karat_lite.train` is the module that one runs; the function of that name is `karat_lite.training.train`."""
    code = "import karat_lite as kl; assert not hasattr(kl, 'train'); import karat_lite.train; print(kl.train.__name__)"
    assert child(code) == "karat_lite.train\n"


def test_every_public_name_is_there():
    for name in set(kl.__all__) - {"notebook", "plots", "widgets"}:
        assert getattr(kl, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = kl.nothing
