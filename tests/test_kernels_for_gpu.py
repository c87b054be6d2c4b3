"""What the fused kernels launch, and that GPUs which are not here can hold it in registers and shared memory."""

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


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """To the machine code of A100 and H100. In a process of its own: here the kernels were made for the interpreter."""
    script = Path(__file__).with_name("kernels_for_gpu.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(script.parent.parent), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, str(script), "80", "90"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    made = [line.split("; ") for line in run.stdout.splitlines()]
    assert len(made) == 2 * (2 * 3 + 2 * 4) + 3 + 5 * 4  # for both; for the last alone: keys and right together, or not
    assert [x for x in made if int(x[4]) > SHARED[int(x[0])]] == []
    assert [x for x in made if int(x[5]) > STACK] == []
