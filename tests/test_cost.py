"""Counting and measuring: against numbers counted by hand, and against work whose size is known."""

import math
import os
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from karat_lite.analysis import cost

FLOAT = 4  # bytes

# ---- bytes kept for the backward pass -------------------------------------------------------------------------------


def test_a_linear_layer_keeps_its_input():
    layer, x = nn.Linear(5, 7), torch.randn(3, 5)
    assert cost.kept_bytes(lambda: layer(x), layer.parameters()) == 3 * 5 * FLOAT
    x.requires_grad_()  # now its weight is needed too, for the input's gradient
    assert cost.kept_bytes(lambda: layer(x), layer.parameters()) == 3 * 5 * FLOAT
    assert cost.kept_bytes(lambda: layer(x)) == (3 * 5 + 5 * 7) * FLOAT


def test_softmax_attention_keeps_inputs_and_one_map():
    """q (scaled), k for the scores; softmax's result, which is also the left factor of the last product; v."""
    q, k, v = (torch.randn(2, 3, 11, 4, requires_grad=True) for _ in range(3))
    kept = cost.kept_bytes(lambda: (q * 0.5 @ k.mT).softmax(dim=-1) @ v)
    assert kept == (3 * 2 * 3 * 11 * 4 + 2 * 3 * 11 * 11) * FLOAT


def test_shared_memory_counts_once_and_whole():
    x = torch.randn(10, 8, requires_grad=True)
    assert cost.kept_bytes(lambda: x * x) == 80 * FLOAT
    packed = torch.randn(6, 8)
    one, other = (part.detach().requires_grad_() for part in packed.unbind(0)[:2])
    assert cost.kept_bytes(lambda: one * other) == 48 * FLOAT  # two rows of one storage: it stays as a whole
    assert cost.kept_bytes(lambda: (x * x).view(-1) * x.view(-1), [x]) == 80 * FLOAT  # a result that is no input


def test_kept_bytes_needs_a_graph():
    with pytest.raises(ValueError, match="without a graph.*Let its inputs require gradients"):
        cost.kept_bytes(lambda: torch.randn(3).exp())


# ---- operations and traffic -----------------------------------------------------------------------------------------


def test_a_matrix_product_by_hand():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    counted = cost.count(lambda: a @ b)
    assert counted == (2 * 3 * 5 * 7, 0, (3 * 5 + 5 * 7 + 3 * 7) * FLOAT)
    assert counted.intensity == 210 / 284


def test_transcendental_numbers():
    x = torch.randn(4, 6)
    for operation in (torch.cos, torch.sin, torch.exp, lambda x: x.softmax(dim=-1), F.gelu, lambda x: x**0.5):
        assert cost.count(lambda operation=operation: operation(x)) == (0, 24, 48 * FLOAT)
    into = torch.empty(4, 6)
    assert cost.count(lambda: torch.cos(x, out=into)) == (0, 24, 48 * FLOAT)
    assert cost.count(lambda: x.clone().cos_()) == (0, 24, 4 * 24 * FLOAT)
    for operation in (torch.neg, lambda x: x * x, torch.square):
        assert cost.count(lambda operation=operation: operation(x)).transcendental == 0


def test_traffic_counts_what_is_read_and_written():
    x, y, into = torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 6)
    for run in (lambda: x + y, lambda: x.add_(y), lambda: torch.add(x, y, out=into)):
        assert cost.count(run).bytes_visited == 3 * 24 * FLOAT
    for run in (lambda: x.mT, lambda: x.view(24), lambda: torch.empty(9), lambda: x.new_empty(9), lambda: x[1:3]):
        assert cost.count(run).bytes_visited == 0


def test_the_backward_pass_counts_twice_the_products():
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    assert cost.count(lambda: (a @ b).sum().backward()).flops == 3 * 2 * 3 * 5 * 7


def test_fused_attention_is_counted():
    """Two products of N N d forward; backward five, the scores again and two for each of the two."""
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    products = 2 * 2 * 3 * 16 * 16 * 8
    with torch.no_grad():
        assert cost.count(lambda: F.scaled_dot_product_attention(q, k, v)).flops == 2 * products
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        assert cost.count(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()).flops == 7 * products


# ---- time -----------------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_twice_the_work_takes_twice_the_time():
    a, b = torch.randn(400, 400), torch.randn(400, 400)

    def once():
        return a @ b

    def twice():
        return a @ b, a @ b

    times = cost.compare({"once": once, "twice": twice}, "once", repeats=41)
    assert 1.5 < times["twice"].ratio < 2.7
    assert times["once"][3:] == (1, 1, 1)
    for timing in times.values():
        assert 0 < timing.low <= timing.median <= timing.high and timing.ratio_low <= timing.ratio <= timing.ratio_high


@pytest.mark.alone
def test_compare_runs_in_turns_and_stops_in_time():
    said = []
    runs = {name: lambda name=name: said.append(name) for name in "ab"}
    cost.compare(runs, "a", repeats=3)
    assert said == list("ab" * 4)  # one round to warm up
    said.clear()
    cost.compare(runs, "b", repeats=3, warm_up=False)
    assert said == list("ab" * 3)
    said.clear()
    cost.compare({"a": lambda: (said.append("a"), time.sleep(0.02))}, "a", repeats=1000, seconds=0.2)
    assert 4 <= len(said) <= 12
    said.clear()
    cost.compare(runs, "a", seconds=0)
    assert said == list("ab" * 4)  # three rounds in any case


def test_compare_lets_every_run_settle():
    done = []
    runs = {name: lambda name=name: done.append(name) for name in "ab"}
    cost.compare(runs, "a", repeats=3, warm_up=False, settle=True)
    assert "".join(done) == "aabb" * 3
    done.clear()
    cost.compare(runs, "a", repeats=3, warm_up=False, settle=["b"])
    assert "".join(done) == "abb" * 3


def test_compare_names_what_is_wrong():
    runs = {"softmax": lambda: None}
    with pytest.raises(ValueError, match="unknown baseline 'sofmax': did you mean 'softmax'"):
        cost.compare(runs, "sofmax")
    with pytest.raises(ValueError, match="repeats must be >= 3, got 2"):
        cost.compare(runs, "softmax", repeats=2)
    with pytest.raises(TypeError, match="repeats must be a whole number"):
        cost.compare(runs, "softmax", repeats=3.0)


# ---- memory and machine ---------------------------------------------------------------------------------------------


def test_peak_memory_sees_a_temporary():
    def run():
        return torch.ones(50_000_000).sum()

    peak = cost.peak_memory(run)
    if peak is None:
        pytest.skip("this system does not tell its peak")
    assert 195e6 < peak < 215e6
    assert cost.peak_memory(run, warm_up=False) == pytest.approx(peak, abs=10e6)
    assert cost.peak_memory(lambda: None) < 5e6  # what an earlier run needed is not counted again


def test_the_machine_has_limits():
    limits = cost.machine_limits(size=64, repeats=3)
    assert 1e6 < limits.flops < 1e16 and 1e7 < limits.bytes < 1e14 and all(map(math.isfinite, limits))
    said = cost.machine()
    assert "cores" in said and f"torch {torch.__version__}" in said


@pytest.mark.alone
def test_other_processes_are_noticed():
    def share():
        end = time.perf_counter() + 0.6
        with cost.Others() as others:
            assert others.share is None
            while time.perf_counter() < end:
                pass
        return others.share

    alone = share()
    if alone is None:
        pytest.skip("this system does not tell")
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
    try:
        time.sleep(0.3)
        beside = share()
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert 0 <= alone <= 1 and 0.3 < beside <= 1  # this process keeps one core of several, or half of the only one


def test_series_of_losses_count_and_a_sum_that_begins_reads_nothing():
    x = torch.randn(3, 5)
    for run in (lambda: x.log_softmax(dim=-1), lambda: torch.nn.functional.softplus(x)):
        assert cost.count(run).transcendental == 15
    total, a, b = torch.zeros(2, 3, 4), torch.ones(2, 3, 5), torch.ones(2, 5, 4)
    new, on = (cost.count(lambda beta=beta: total.baddbmm_(a, b, beta=beta)).bytes_visited for beta in (0, 1))
    assert new == 4 * (30 + 40 + 24) and on == new + 4 * 24


def test_a_model_that_is_timed_draws_from_a_state_of_its_own():
    from karat_lite.analysis.rivals import Case, Model

    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    case = Case(1, 3, 5, 64, G=1, r=2, model="vit_tiny")
    Model("recompute", case, torch.device("cpu"), img_size=32)
    assert torch.equal(torch.rand(2), wanted)
