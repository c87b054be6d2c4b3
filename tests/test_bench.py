"""The benchmark, really run on small sizes; its competitors' numbers; what it concludes; its figure."""

import copy
import dataclasses
import io
import json

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from figures import texts
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.style import context
from matplotlib.text import Text
from PIL import Image

from karat_lite import bench, make_basis
from karat_lite.analysis import rivals
from karat_lite.analysis.rivals import Case
from karat_lite.analysis.verdict import growth, r_squared, slope, targets
from karat_lite.bench_plots import as_png, bench_figure, limit_bars
from karat_lite.functional import karat_attention

SMALL = Case(2, 2, 17, 16, 2, 3)
TINY = bench.Sizes(
    seconds=600,  # the rounds end it long before
    repeats=3,
    shapes=(SMALL,),
    tokens=(5, 785, 801, 817),
    tokens_of=SMALL._replace(B=1, h=1),
    grids=(1, 2, 3),
    ranks=(2, None),
    grids_of=SMALL,
    models=(Case(2, 4, 5, 16, 2, 3, model="vit_pico"), Case(1, 3, 5, 64, 2, 3, model="vit_tiny")),
    img_size=32,
    limits=64,
)
KEYS = [
    "part", "what", "competitor", *Case._fields, "median", "low", "high", "ratio", "ratio_low", "ratio_high",
    "kept_bytes", "peak_bytes", "others",
]  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The command line on tiny sizes: the folder it wrote in, and what it wrote."""
    folder = tmp_path_factory.mktemp("bench") / "new"
    bench.main(
        ["--seconds", "600", "--threads", str(torch.get_num_threads()), "--results", str(folder / "tiny.json")], TINY
    )
    return folder, json.loads((folder / "tiny.json").read_text())


def rows_of(results, **fields):
    return [row for row in results["rows"] if all(row[key] == value for key, value in fields.items())]


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_writes_whole_files(measured):
    folder, results = measured
    assert sorted(path.name for path in folder.iterdir()) == ["tiny.json", "tiny.png"]
    assert results["command"].startswith("python -m karat_lite.bench --seconds 600 --threads")
    assert results["threads"] == torch.get_num_threads() and results["torch"] == torch.__version__
    assert torch.__version__ in results["machine"] and results["limits"]["float32"]["flops"] > 0
    assert results["others"] is None or 0 <= results["others"] <= 100
    assert 0 < results["seconds"] < 600 and results["left_out"] == []
    assert bench.as_text(results) == (folder / "tiny.json").read_text()
    assert Image.open(folder / "tiny.png").size[0] > 800


def test_every_row_is_complete(measured):
    for row in measured[1]["rows"]:
        assert list(row) == KEYS
        assert 0 < row["low"] <= row["median"] <= row["high"] and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        first = row["competitor"] == "softmax" or row["part"] == "growth" and row["N"] == 785
        assert not first or row["ratio"] == row["ratio_low"] == row["ratio_high"] == 1
        assert (row["G"] is None) == (row["r"] is None) == (row["competitor"] in ("softmax", "sdpa"))
        trained = row["what"] in ("layer forward and backward", "model forward and backward", "model training step")
        assert row["peak_bytes"] is None or row["peak_bytes"] >= 0  # None: a system that hides it
        assert (row["kept_bytes"] is not None) == trained and not row["compiled"]


def test_every_part_has_everybody(measured):
    karat = rivals.karat_kinds(torch.device("cpu"))
    assert karat == ["recompute", "contraction"]
    all_of_them = ["softmax", "sdpa", *karat, "features", "broadcast"]
    for what in ("layer forward", "layer forward and backward"):
        assert [row["competitor"] for row in rows_of(measured[1], part="shapes", what=what)] == all_of_them
        for n in TINY.tokens:
            assert [row["competitor"] for row in rows_of(measured[1], part="tokens", what=what, N=n)] == all_of_them
        for name in ("sdpa", karat[0]):
            in_turns = rows_of(measured[1], part="growth", what=what, competitor=name)
            assert [row["N"] for row in in_turns] == [785, 801, 817]
        for name in karat:
            along_g = rows_of(measured[1], part="grids", what=what, competitor=name)
            assert [row["G"] for row in along_g] == [1, 2, 3] and {row["r"] for row in along_g} == {3}
            assert [row["r"] for row in rows_of(measured[1], part="ranks", what=what, competitor=name)] == [2, 17]
    for what in ("model inference", "model training step"):
        line = rows_of(measured[1], what=what, model="vit_pico")
        assert [row["competitor"] for row in line] == ["softmax", "sdpa", *karat, karat[0]]
        assert line[-1]["r"] == 5 and line[-2]["r"] == 3
        line = rows_of(measured[1], what=what, model="vit_tiny")
        assert [row["competitor"] for row in line] == ["softmax", "sdpa", karat[0]] and line[-1]["r"] == 3
    both = rows_of(measured[1], what="model forward and backward")
    assert [(row["model"], row["competitor"]) for row in both] == [
        ("vit_pico", name) for name in ("softmax", "sdpa", karat[0])
    ]


def test_kept_bytes_are_those_of_the_arrays(measured):
    """In one packed array q, k, v; softmax keeps its map and scales q first, a fused softmax its result and a sum."""
    kept = {
        row["competitor"]: row["kept_bytes"] for row in rows_of(measured[1], part="tokens", N=817) if row["kept_bytes"]
    }
    packed, plane, units = 3 * 817 * 16 * 4, 817**2 * 4, 817 * 3 * 4
    assert kept["softmax"] == packed + 817 * 16 * 4 + plane
    assert kept["recompute"] == packed + units
    assert kept["sdpa"] < packed + plane / 10
    assert kept["contraction"] > 4 * plane and kept["features"] > 4 * plane and kept["broadcast"] > 4 * plane


def test_too_little_time_is_said(capsys):
    results = bench.run(dataclasses.replace(TINY, seconds=1e-9), torch.device("cpu"))
    assert results["rows"] == results["growth"] == results["targets"] == []
    assert {left["why"] for left in results["left_out"]} == {"time"}
    assert {left["part"] for left in results["left_out"]} == {"models", "shapes", "tokens", "growth", "grids", "ranks"}
    with pytest.raises(ValueError, match="nothing to draw: give the benchmark more --seconds"):
        bench_figure(results)


def test_what_does_not_fit_is_left_out():
    one = bench.Bench(
        dataclasses.replace(TINY, room=4 * 2 * 2 * 17**2 * 8), torch.device("cpu"), ["recompute", "contraction"]
    )
    one.shapes(600)
    assert {left["competitor"] for left in one.left_out} == {"features", "broadcast"}
    assert {left["why"] for left in one.left_out} == {"memory"}
    assert {row["competitor"] for row in one.rows} == {"softmax", "sdpa", "recompute", "contraction"}


def test_who_is_too_slow_is_not_tried_again_with_more_tokens(monkeypatch):
    one = bench.Bench(dataclasses.replace(TINY, tokens=(785, 801, 817)), torch.device("cpu"), ["recompute"])
    try_it, tried = one._try, []

    def slow(name, case, mode, seconds):
        tried.append((name, mode, case.N))
        return (None, 0.0, "time") if name == "features" and case.N > 785 else try_it(name, case, mode, seconds)

    monkeypatch.setattr(one, "_try", slow)
    one.along_n(600)
    assert [n for name, mode, n in tried if name == "features" and mode == "infer"] == [785, 801]
    assert [left["N"] for left in one.left_out if left["what"] == "layer forward"] == [801, 817]


def test_every_compiled_model_is_compiled(monkeypatch):
    """torch.compile takes a handful of versions of one function, then runs it uncompiled and says so in a log."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True, raising=False)
    compiler = torch._dynamo.testing.CompileCounterWithBackend("eager")
    models = tuple(TINY.models[0]._replace(B=images, compiled=True) for images in (1, 2))
    sizes = dataclasses.replace(TINY, models=models, compiler=compiler)
    one = bench.Bench(sizes, torch.device("cpu"), ["recompute"])
    one.models(600)
    assert len(one.rows) == 16 and one.left_out == []
    assert compiler.frame_count == 20  # softmax once more in each line-up, beside full rank
    assert {row["kept_bytes"] for row in one.rows} == {None}


def test_a_backend_that_cannot_run_here_is_passed_over(monkeypatch, capsys):
    monkeypatch.setattr(rivals, "BACKENDS", ("reference", "contraction", "new"))
    assert rivals.karat_kinds(torch.device("cpu")) == ["contraction"]
    assert "backend 'new' is not available here: unknown backend 'new'" in capsys.readouterr().out


def test_the_command_line_explains_itself(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    assert "python -m karat_lite.bench" in (said := capsys.readouterr().out) and "--seconds" in said
    with pytest.raises(ValueError, match="--seconds must be positive, got 0"):
        bench.main(["--seconds", "0", "--results", str(tmp_path / "no.json")])
    with pytest.raises(ValueError, match="--threads must be >= 1, got 0"):
        bench.main(["--threads", "0", "--results", str(tmp_path / "no.json")])
    with pytest.raises(ValueError, match="unknown device .*'tpu'"):
        bench.main(["--device", "tpu"])
    with pytest.raises(ValueError, match="there is no .*no.json: run without --draw first"):
        bench.main(["--draw", "--results", str(tmp_path / "no.json")])
    assert not list(tmp_path.iterdir())


def test_only_the_figure(measured, tmp_path):
    results = measured[0] / "tiny.json"
    bench.main(["--draw", "--results", str(results), "--figure", str(tmp_path / "new" / "a.png")])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


# ---- competitors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [3, 17])
def test_competitors_agree_in_double_precision(rank):
    """Values and gradients: all ways of softmax with each other, all ways of KArAt with the reference."""
    case = SMALL._replace(r=rank, dtype="float64")
    for names in (("softmax", "sdpa"), ("broadcast", "features", "contraction", "recompute")):
        found = {}
        for name in names:
            layer = rivals.Layer(name, case, torch.device("cpu"))
            layer.inputs = [x.detach().double().requires_grad_() for x in layer.inputs]
            out = layer.forward()
            found[name] = [out, *torch.autograd.grad(out, layer.inputs, layer.grad)]
        for name in names[1:]:
            for value, wanted in zip(found[name], found[names[0]], strict=True):
                assert (value - wanted).abs().max() <= 1e-12 * wanted.abs().max(), name


def test_the_feature_form_under_autocast():
    layer = rivals.Layer("features", SMALL._replace(dtype="bfloat16"), torch.device("cpu"))
    q, k, v, coef, weight = layer.inputs
    basis = make_basis("fourier", 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = bench.feature_form(q, k, v, basis, coef, weight)
    wanted = karat_attention(q, k, v, basis, coef, weight, backend="reference")
    assert out.dtype == torch.bfloat16 and torch.allclose(out, wanted, rtol=2e-2, atol=1e-2)


def test_models_differ_in_their_attention_alone():
    case = Case(2, 4, 5, 16, 2, 3, model="vit_pico")
    eager, fused, karat = (
        rivals.Model(name, case, torch.device("cpu"), 32) for name in ("softmax", "sdpa", "recompute")
    )
    assert torch.equal(eager.images, fused.images) and torch.equal(eager.images, karat.images)
    assert torch.allclose(eager.forward(), fused.forward(), atol=1e-5)
    assert not torch.allclose(eager.forward(), karat.forward(), atol=1e-3)
    assert all(operator.backend == "recompute" for operator in karat.model.operators())
    before = copy.deepcopy(karat.model.state_dict())
    karat.learn()
    assert all(not torch.equal(before[key], value) for key, value in karat.model.state_dict().items())


# ---- conclusions ----------------------------------------------------------------------------------------------------


def test_slope_and_linearity():
    n = [785, 1025, 1601, 2305, 4097]
    assert slope(n, [3e-9 * x**2 for x in n]) == pytest.approx(2)
    assert slope(n, [7 * x**-1.5 for x in n]) == pytest.approx(-1.5)
    assert r_squared([1, 2, 3, 11], [2.5, 4.5, 6.5, 22.5]) == pytest.approx(1)
    x, y = np.arange(5.0), np.array([1.0, 0.0, 2.0, 1.0, 4.0])
    assert r_squared(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
    assert r_squared(x, np.ones(5)) == 1
    for bad in ([1, 1], [1]):
        with pytest.raises(ValueError, match="two different x"):
            slope(bad, bad)


def synthetic(part, what, competitor, case, seconds, ratio=1.0, **fields):
    timing = dict(median=seconds, low=0.9 * seconds, high=1.1 * seconds, ratio=ratio, ratio_low=0.9 * ratio)
    row = dict(part=part, what=what, competitor=competitor, **case._asdict(), **timing, ratio_high=1.1 * ratio)
    return {**row, "kept_bytes": None, "peak_bytes": None, **fields}


def test_growth_and_targets_on_known_rows():
    both, step, rows = "layer forward and backward", "model training step", []
    for n in (65, 197, 785, 1025, 1601, 4097):
        kept = 1000 * n if n >= 785 else 1  # small sizes play no part
        rows.append(synthetic("tokens", both, "recompute", Case(1, 3, n, 64), 1.0, kept_bytes=kept))
        rows.append(synthetic("tokens", both, "triton", Case(1, 3, n, 64), 1.0, peak_bytes=kept**1.5))
        if n >= 785:  # a machine that is slower from time to time: seconds do not tell, ratios of a round do
            rows.append(synthetic("growth", both, "recompute", Case(1, 3, n, 64), 1.0 + n % 7, (n / 785) ** 2))
    for grid in (1, 2, 3, 5):
        rows.append(synthetic("grids", both, "recompute", Case(1, 3, 197, 64, grid), 2.0 + grid))
    rows.append(synthetic("grids", both, "softmax", Case(1, 3, 197, 64, None, None), 2.0))
    tiny = Case(8, 3, 197, 64, model="vit_tiny")
    none = dict(G=None, r=None)
    rows += [
        synthetic("models", step, "softmax", tiny._replace(**none), 1.0, kept_bytes=100, peak_bytes=1),
        synthetic("models", step, "sdpa", tiny._replace(**none), 0.9, 0.9, kept_bytes=80, peak_bytes=1),
        synthetic("models", step, "recompute", tiny, 1.2, 1.25, kept_bytes=81, peak_bytes=1),
        synthetic("models", step, "recompute", tiny._replace(r=197), 2.2, 2.2, kept_bytes=90, peak_bytes=1),
        synthetic("models", "model inference", "softmax", tiny._replace(**none), 1.0),
        synthetic("models", "model inference", "recompute", tiny, 1.2, 1.21),
        synthetic("models", "model inference", "recompute", tiny._replace(B=1), 1.5, 1.5),  # no bound was set for it
        synthetic("shapes", both, "recompute", Case(8, 3, 197, 64), 1.0),
        synthetic("shapes", both, "features", Case(8, 3, 197, 64), 4.0),
    ]
    grown = growth(rows)
    named = {"what": both, "competitor": "recompute", "dtype": "float32"}
    assert grown == [
        {"of": "time", "in": "N", **named, "points": 4, "slope": 2.0},
        {"of": "kept_bytes", "in": "N", **named, "points": 4, "slope": 1.0},
        {"of": "peak_bytes", "in": "N", **named, "competitor": "triton", "points": 4, "slope": 1.5},
        {"of": "time", "in": "G", **named, "points": 4, "r_squared": 1.0},
    ]
    found = [(target["found"], target["bound"], target["met"]) for target in targets(rows, grown, "recompute")]
    assert found == [
        (1.25, "<= 1.3", True), (1.21, "<= 1.2", False), (0.25, "<= 0.5", True), (1.0125, "<= 1.02", True),
        (0.81, "<= 0.9", True), (1.125, "<= 1.1", False), (2.0, "1.8 to 2.1", True), (1.0, ">= 0.98", True),
    ]  # fmt: skip
    (memory,) = targets([], grown, "triton")  # the kernels' partial sums are seen there
    assert (memory["found"], memory["bound"], memory["met"]) == (1.5, "0.9 to 1.1", False)


# ---- the figure -----------------------------------------------------------------------------------------------------


def gpu_results() -> dict:
    """As a GPU would write them: two types, three models, compiled, a backend more."""
    rows = []
    for dtype, slower in (("bfloat16", 1.0), ("float32", 9.0)):
        for i, name in enumerate(("softmax", "sdpa", "triton", "recompute", "contraction", "features", "broadcast")):
            own = dict(G=None, r=None) if i < 2 else {}
            for n in (65, 785, 4097)[: 3 if i < 5 else 2]:
                case = Case(16, 3, n, 64, dtype=dtype)._replace(**own)
                rows.append(
                    synthetic("tokens", "layer forward and backward", name, case, slower * (1 + i) * n**2 * 1e-8)
                )
            for grid in (1, 11) if 2 <= i < 5 else (None,) if i < 2 else ():
                case = Case(16, 3, 197, 64, grid, 12 if grid else None, dtype)
                rows.append(
                    synthetic("grids", "layer forward and backward", name, case, slower * (i + (grid or 1)) * 1e-3)
                )
    for size, heads in (("vit_tiny", 3), ("vit_small", 6), ("vit_base", 12)):
        for i, name in enumerate(("softmax", "sdpa", "triton")):
            case = Case(64, heads, 197, 64, *((None, None) if i < 2 else (3, 12)), "bfloat16", size)
            for compiled in (False, True):
                own = dict(ratio=1 - 0.2 * i, peak_bytes=int(1e9) * heads)
                case = case._replace(compiled=compiled)
                rows.append(synthetic("models", "model training step", name, case, 0.1, **own))
    return {"machine": "16 cores, x86_64, a GPU, torch 2.9", "threads": 16, "others": 21.0, "rows": rows}


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_figure(kind, measured):
    results = measured[1] if kind == "cpu" else gpu_results()
    figure = bench_figure(results)
    assert len(figure.axes) == 4
    said = texts(figure)
    assert all(words in said for words in ("tokens $N$", "harmonics $G$", "(ms)", "(MB)", "eager softmax = 1"))
    assert "KArAt, recompute" in said and "softmax, fused" in said and results["machine"] in said
    if kind == "cpu":
        assert "training step, ViT-Pico, 2 images" in said and "training step, ViT-Tiny, 1 image" in said
        assert "inference, ViT-Pico, 2 images" in said and "inference, ViT-Tiny" not in said
        lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == len(TINY.tokens)]
        wanted = rows_of(results, part="tokens", what="layer forward and backward", competitor="softmax")
        assert np.allclose(lines[0].get_ydata(), [1e3 * row["median"] for row in wanted])
    else:
        assert "KArAt, fused kernel" in said and "ViT-Base" in said and "compiled" in said and "bfloat16" in said
        assert "other processes took 21 % of the machine" in said
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= -0.01 and box.y0 >= -0.01 and box.x1 <= width + 0.01 and box.y1 <= height + 0.01
    png = as_png(figure)
    assert 10_000 < len(png) < 150_000
    with context("dark_background"):
        assert as_png(bench_figure(results)) == png
    assert np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))[0, 0].tolist() == [255] * 3


def test_labels_of_lines_do_not_overlap(measured):
    """Names at the ends of lines, and names of bars, each with room of its own."""
    for results in (measured[1], gpu_results()):
        figure = bench_figure(results)
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        for axes in figure.axes:
            boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]  # of the words alone, no arrows
            for i, one in enumerate(boxes):
                for other in boxes[:i]:
                    across = min(one.x1, other.x1) - max(one.x0, other.x0)
                    down = min(one.y1, other.y1) - max(one.y0, other.y0)
                    assert across <= 1 or down <= 2


def test_what_limits_a_kernel():
    least = {"one": {"slots": 3.0, "memory": 1.0}, "two": {"slots": 2.0, "memory": 6.0}}
    figure = limit_bars(least, {"one": 4.5, "two": 9.0, "three": 1.0})
    (axes,) = figure.axes
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert bars == [(0, 3), (0, 2), (3, 1), (2, 6)]  # limit by limit, each behind the one before
    assert [list(line.get_xdata()) for line in axes.lines] == [[4.5, 4.5], [9.0, 9.0]]
    assert all(words in texts(figure) for words in ("one", "two", "slots", "memory", "measured", "4.5", "microseconds"))
    for bad in ({"one": 0.0, "two": 1.0}, {"one": 1.0}):
        with pytest.raises(ValueError, match="positive|not finite"):
            limit_bars(least, bad)


def test_a_part_that_is_missing_is_said():
    rows = [row for row in gpu_results()["rows"] if row["part"] == "tokens"]
    said = texts(bench_figure({**gpu_results(), "rows": rows}))
    assert said.count("not measured") == 3
    with pytest.raises(TypeError, match="results must be a dict"):
        bench_figure([1])
