"""What the fused kernels launch, and that GPUs which are not here can hold it in registers and shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton exists for Linux alone", allow_module_level=True)

from karat_lite.kernels.fourier_triton import _plans

SHARED = {80: 99 * 1024, 90: 227 * 1024}  # bytes; of sm_80's 163 KB what sm_86 and sm_89 have too: the same code
LIMITS = Path(__file__).parent.parent / "data" / "results" / "h200_limits.json"
STACK = 256  # bytes of a thread: what is not needed inside of a loop is put aside there. Spilled tiles take more


@pytest.mark.parametrize(
    "d, e, grid, images, last",
    [
        (64, 12, 3, 1, ["keys and right"]),
        (64, 12, 4, 1, ["keys", "right"]),
        (64, 24, 3, 1, ["keys", "right"]),
        (80, 12, 3, 1, ["keys", "right"]),
        (64, 16, 3, 2, ["keys", "right"]),
    ],
)
def test_keys_and_right_go_together_where_the_accumulators_fit(d, e, grid, images, last):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        q, right = torch.empty(2, 1, 5, d, dtype=dtype), torch.empty(images, 1, 2 * grid, 5, e)
        assert list(_plans(q, right)) == ["mix", "queries", *last]


def for_gpus(script: str, *args: str, cache: Path) -> str:
    """What the script prints. In a process of its own: here the kernels were made for the interpreter."""
    place = Path(__file__).with_name(script)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    environment["PYTHONPATH"] = os.pathsep.join([str(place.parent.parent), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, str(place), *args], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """To the machine code of A100 and H100."""
    made = [line.split("; ") for line in for_gpus("kernels_for_gpu.py", "80", "90", cache=tmp_path).splitlines()]
    assert len(made) == 2 * (2 * 3 + 2 * 4) + 3 + 5 * 4  # for both; for the last alone: keys and right together, or not
    assert [x for x in made if int(x[4]) > SHARED[int(x[0])]] == []
    assert [x for x in made if int(x[5]) > STACK] == []


def test_least_times_are_those_of_the_kernels_as_they_are(tmp_path):
    """The file is that of this code; another Triton may need a few instructions more or less."""
    for_gpus("limits_for_gpu.py", str(tmp_path / "limits.json"), cache=tmp_path)
    found, kept = (json.loads(path.read_text())["rows"] for path in (tmp_path / "limits.json", LIMITS))
    assert len(found) == 6
    for mine, its in zip(found, kept, strict=True):
        assert [mine[key] for key in ("kernel", "images", "tokens", "flops", "bytes")] == [
            its[key] for key in ("kernel", "images", "tokens", "flops", "bytes")
        ]
        for key in ("instructions", "special"):
            assert mine[key] == pytest.approx(its[key], rel=0.1)
        scores = mine["images"] * 3 * mine["tokens"] ** 2  # each a sine and a cosine, some of them in padding
        assert 2 * scores <= 32 * mine["special"] < 4 * scores and mine["flops"] > 2 * (64 + 72) * scores
