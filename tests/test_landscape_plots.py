"""Figures of landscapes hold the grids, paths and shares that they are given; the table's command on tiny runs."""

import json
import math

import matplotlib.style
import numpy as np
import pytest
import torch
from figures import pixels, texts
from formats import small_folder
from matplotlib.colors import LogNorm

import karat_lite as kl
from karat_lite import landscape_plots, widgets
from karat_lite.analysis import landscape_table
from karat_lite.analysis.directions import Directions
from karat_lite.analysis.landscape import Landscape, PathLosses


def grid(depth=1.0, points=7):
    alphas, betas = np.linspace(-2, 4, points), np.linspace(-3, 3, points + 1)
    return Landscape(alphas, betas, 0.1 + depth * np.hypot(*np.meshgrid(alphas, betas)))


def walk(scale=1.0):
    at = scale * np.array([[3.0, 1.0], [1.0, -1.0], [0.0, 0.0]])
    return PathLosses(at, np.array([2.0, 0.5, 0.1]), np.array([2.3, 0.4, 0.1]))


def axes_of(kind, explained=None):
    return Directions(kind, {}, {"a": torch.zeros(2, 1)}, explained)


GRIDS = {"softmax": grid(), "KArAt": grid(3)}
PATHS = {"softmax": walk(), "KArAt": walk(0.5)}
NAMES = {name: axes_of("principal", np.array([0.7, 0.2, 0.1])) for name in GRIDS}
RESULTS = {
    "measures": {"largest": "largest eigenvalue", "rise": "rise", "length": "path", "distance": "distance"},
    "runs": [
        {"model": model, "largest": i + k + 1, "rise": 0.1 * i - 0.05, "length": 90 + i, "distance": 30 + k}
        for i, model in enumerate(("softmax", "karat")) for k in range(3)
    ],
}  # fmt: skip
SCENES = {
    "surface": lambda: landscape_plots.surface(GRIDS, PATHS, directions=NAMES),
    "one surface": lambda: landscape_plots.surface({"KArAt": grid()}, elevation=0, azimuth=180),
    "contours": lambda: landscape_plots.contours(GRIDS, PATHS, directions=NAMES),
    "profiles": lambda: landscape_plots.profiles([-1, 0, 1], {"a": [[2, 1, 2], [3, 1, 4]], "b": [2, 0.1, 5]}, "share"),
    "explained": lambda: landscape_plots.explained_shares({"a": [0.8, 0.1, 0.1], "b": [0.5, 0.3]}),
    "sharpness": lambda: landscape_plots.sharpness(RESULTS),
}


@pytest.mark.parametrize("name", SCENES)
def test_figures_are_whole_and_the_same_in_a_dark_style(name):
    figure = SCENES[name]()
    plain = pixels(figure)
    with matplotlib.style.context("dark_background"):
        assert np.array_equal(plain, pixels(SCENES[name]()))
    assert (plain[0, 0, :3] == 255).all() and plain.std() > 10
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    if "surface" not in name:  # a 3-D panel's own box is larger than what is drawn in it
        assert box.x0 >= -0.01 and box.y0 >= -0.01 and box.x1 <= width + 0.01 and box.y1 <= height + 0.01
    edge = np.concatenate([plain[:2].ravel(), plain[-2:].ravel(), plain[:, :2].ravel(), plain[:, -2:].ravel()])
    assert (edge > 250).all(), "something touches the edge"


def test_a_surface_has_the_grids_heights_and_turns():
    figure = landscape_plots.surface(GRIDS, PATHS, elevation=20, azimuth=45, directions=NAMES)
    panels = [axes for axes in figure.axes if axes.name == "3d"]
    assert [axes.get_title() for axes in panels] == ["softmax", "KArAt"]
    for axes, name in zip(panels, GRIDS, strict=True):
        assert (axes.elev, axes.azim) == (20, 45)
        assert len(axes.collections[0].get_facecolor()) == 6 * 7
        x, y, z = axes.lines[0].get_data_3d()
        assert np.allclose(np.stack([x, y], 1), PATHS[name].coordinates)
        assert np.allclose(z, np.log10(PATHS[name].projected))
        assert np.allclose(axes.get_zlim(), panels[0].get_zlim()), "equal heights for equal losses"
    low, high = 10 ** np.array(panels[0].get_zlim())
    both = np.concatenate([g.loss.ravel() for g in GRIDS.values()])
    assert low <= both.min() * 1.2 and high >= both.max() / 1.2
    assert "direction 1 (70 %)" in texts(figure) and "loss (nats)" in texts(figure)
    assert not np.array_equal(pixels(SCENES["surface"]()), pixels(figure))


def test_bounds_make_single_figures_comparable():
    for draw in (landscape_plots.surface, landscape_plots.contours):
        bars = [draw({name: GRIDS[name]}, bounds=(0.05, 30)).axes[-1] for name in GRIDS]
        assert np.allclose([bar.get_ylim() for bar in bars], (0.05, 30))
        assert not np.allclose(draw({"softmax": GRIDS["softmax"]}).axes[-1].get_ylim(), (0.05, 30))


def test_contours_share_levels_and_draw_the_path_from_ring_to_star():
    figure = landscape_plots.contours(GRIDS, PATHS, directions=NAMES)
    one, other = figure.axes[:2]
    filled = [axes.collections[0] for axes in (one, other)]
    assert np.allclose(filled[0].levels, filled[1].levels) and len(filled[0].levels) == landscape_plots.LEVELS
    assert np.allclose(filled[0].levels[[0, -1]], [filled[0].norm.vmin, filled[0].norm.vmax])
    assert isinstance(filled[0].norm, LogNorm) and filled[0].norm is filled[1].norm
    both = np.concatenate([g.loss.ravel() for g in GRIDS.values()])
    assert np.isclose(filled[0].norm.vmin, both.min()) and np.isclose(filled[0].norm.vmax, both.max())
    for axes, name in zip((one, other), GRIDS, strict=True):
        path, ring, star = axes.lines
        assert np.allclose(path.get_xydata(), PATHS[name].coordinates)
        assert np.allclose(ring.get_xydata(), PATHS[name].coordinates[:1]) and np.allclose(star.get_xydata(), 0)
        assert axes.get_xlim() == (-2, 4) and axes.get_ylim() == (-3, 3)
    assert "principal direction 2 (20 % of squared distance)" in texts(figure)
    random = landscape_plots.contours(GRIDS, directions=dict.fromkeys(GRIDS, axes_of("random")))
    assert "random direction 1 (in filter norms)" in texts(random) and len(random.axes[0].lines) == 1
    assert "eigenvector 2" in texts(
        landscape_plots.contours(GRIDS, directions=dict.fromkeys(GRIDS, axes_of("sharpest")))
    )


def test_profiles_draw_every_line_and_the_median():
    lines = [[2, 1, 2], [3, 1, 4], [9, 1, 3]]
    (axes,) = landscape_plots.profiles([-1, 0, 1], {"a": lines, "b": [2, 0.1, 5]}, "share of the weights").axes
    assert [list(line.get_ydata()) for line in axes.lines] == [*lines, [3, 1, 3], [2, 0.1, 5]]
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "share of the weights"
    assert "a (median of 3)" in texts(axes.figure)
    (axes,) = landscape_plots.profiles([-1, 0, 1], {"a": lines}, highlight=["a"]).axes
    assert len(axes.lines) == 3 and "median" not in texts(axes.figure)


def test_shares_and_seeds():
    (axes,) = landscape_plots.explained_shares({"a": [0.8, 0.15, 0.05], "b": [0.5, 0.3]}, components=2).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[80, 15], [50, 30]]
    assert "a: 95 % in the first two" in texts(axes.figure)
    figure = landscape_plots.sharpness(RESULTS)
    drawn = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in drawn] == list(RESULTS["measures"].values())
    mean, dots = drawn[0].lines[2:]
    assert list(dots.get_xdata()) == [2, 3, 4] and list(mean.get_xdata()) == [3, 3]
    assert drawn[1].get_xlim()[0] < 0, "a negative rise is shown too"
    far = {"measures": {"x": "x"}, "runs": [{"model": "a", "x": x} for x in (1, 10, 100)]}
    (axes,) = landscape_plots.sharpness(far).axes
    assert axes.get_xscale() == "log" and np.allclose(axes.lines[0].get_xdata(), 10), "a geometric mean"
    assert drawn[0].get_xscale() == "linear"


def test_measures_that_not_all_runs_have_are_left_out():
    """The committed file names two measures of the path; its runs kept no snapshots."""
    results = json.loads((kl.checkpoints.CHECKPOINTS.parent / "results" / "cifar10_landscape.json").read_text())
    assert "explained_two" in results["measures"] and "explained_two" not in results["runs"][0]
    figure = landscape_plots.sharpness(results)
    titles = [title for axes in figure.axes if (title := axes.get_title(loc="left"))]
    assert titles == list(results["measures"].values())[:4]


NEGATIVE = Landscape([0, 1], [0, 1], [[1, -1], [1, 1]])
BAD = {
    "no dict": (lambda: landscape_plots.surface(grid()), TypeError, "dict with a name"),
    "shapes": (lambda: landscape_plots.contours({"a": Landscape([0, 1], [0, 1, 2], np.ones((2, 3)))}), ValueError,
               r"\(betas, alphas\) = \(3, 2\)"),
    "unfinished": (lambda: landscape_plots.surface({"a": Landscape([0, 1], [0, 1], [[1, np.nan], [1, 1]])}), ValueError,
                   "not finite"),
    "negative": (lambda: landscape_plots.contours({"a": NEGATIVE}), ValueError, "negative"),
    "a path is missing": (lambda: landscape_plots.contours(GRIDS, {"softmax": walk()}), ValueError, "one for each"),
    "another length": (lambda: landscape_plots.profiles([0, 1], {"a": [1, 2, 3]}), ValueError, "3 points a line"),
    "shares": (lambda: landscape_plots.explained_shares({"a": [80, 20]}), ValueError, "sum to at most 1"),
    "bounds": (lambda: landscape_plots.contours(GRIDS, bounds=(2, 1)), ValueError, "the lower one first"),
    "no runs": (lambda: landscape_plots.sharpness({"runs": []}), ValueError, "no runs"),
    "no measure": (lambda: landscape_plots.sharpness({**RESULTS, "measures": {"x": "x"}}), ValueError, "all runs: x"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told(name):
    call, kind, said = BAD[name]
    with pytest.raises(kind, match=said):
        call()


def test_the_explorer_answers_in_time():
    """Both views at both ends of every control; the median move within 0.3 s of processor time (best of three)."""
    import time

    def draw(model="softmax", view="surface", elevation=35, azimuth=-60):
        one, path = {model: grid(points=21)}, {model: walk()}
        if view == "contours":
            return landscape_plots.contours(one, path, directions=NAMES)
        return landscape_plots.surface(one, path, elevation=elevation, azimuth=azimuth, directions=NAMES)

    explorer = kl.widgets.explore(
        draw, model=["softmax", "KArAt"], view=["surface", "contours"], elevation=range(0, 91, 5),
        azimuth=range(-170, 181, 10)
    )  # fmt: skip
    moves, pictures = [("elevation", 0), ("elevation", 90), ("azimuth", -170), ("azimuth", 180), ("model", "KArAt"),
                       ("view", "contours"), ("view", "surface"), ("model", "softmax")], []  # fmt: skip
    medians = []
    while len(medians) < 3 and (not medians or medians[-1] > 0.3):
        seconds = []
        for name, value in moves:
            start = time.thread_time()
            explorer.controls[name].value = value
            seconds.append(time.thread_time() - start)
            assert explorer.error.value == "" and explorer.image.value == widgets.render(draw(**explorer.values))
            pictures.append(explorer.image.value)
        medians.append(np.median(seconds))
    assert medians[-1] <= 0.3, medians
    assert explorer.values["elevation"] == 90 and len(set(pictures)) >= 6


# ---- the table -------------------------------------------------------------------------------------------------------


def test_the_table_of_runs(tmp_path, capsys):
    from karat_lite.train import main as train

    options = "--data digits --limit 64 --epochs 1 --attention softmax karat --depth 1 --snapshots 4 --device cpu"
    train([*options.split(), "--seeds", "0", "1", "--out", str(tmp_path / "runs")])
    table = tmp_path / "deep" / "table.json"
    command = f"--runs {tmp_path / 'runs'} --results {table} --images 20 --count 2 --iterations 6 --directions 2"
    command = [*command.split(), "--device", "cpu", "--no-progress"]
    landscape_table.main(command)
    found = json.loads(table.read_text())
    assert [(run["model"], run["seed"]) for run in found["runs"]] == [
        ("softmax", 0), ("softmax", 1), ("karat", 0), ("karat", 1)]  # fmt: skip
    for run in found["runs"]:
        model, card = kl.load_checkpoint(
            tmp_path / "runs" / f"digits_{run['model']}_seed{run['seed']}/model.safetensors"
        )
        images, labels = kl.load_dataset("digits", "train", limit=20)[:]
        with torch.no_grad():
            truth = torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1).item()
        assert run["loss"] == pytest.approx(truth, abs=1e-5) and run["smoothing"] == 0.1
        assert run["test_accuracy"] == card["metrics"]["test_accuracy"]
        assert set(landscape_table.MEASURES) <= set(run) and run["largest"] > 0 and run["explained_two"] <= 100
        assert run["length"] >= run["distance"] > 0 and math.isfinite(run["rise"])
    for model in ("softmax", "karat"):
        values = [run["largest"] for run in found["runs"] if run["model"] == model]
        line = found["summary"][model]
        assert line["seeds"] == 2 and line["largest"]["mean"] == pytest.approx(np.mean(values))
        assert line["largest"]["std"] == pytest.approx(np.std(values, ddof=1))
    pixels(landscape_plots.sharpness(found))
    capsys.readouterr()
    landscape_table.main(command)
    assert capsys.readouterr().out.count("already in the results") == 4
    assert json.loads(table.read_text())["runs"] == found["runs"]
    with pytest.raises(ValueError, match="measured with images = 20, now 30"):
        landscape_table.main([*command, "--images", "30"])
    with pytest.raises(FileNotFoundError, match="no run in .*--snapshots 20"):
        landscape_table.main(["--runs", str(tmp_path), "--results", str(table)])


def test_a_run_without_snapshots_on_a_folder_of_pictures(tmp_path):
    """Curvature needs no path: what is said of the path is missing, not made up."""
    from karat_lite.train import main as train

    data = small_folder(tmp_path / "few")
    train(f"--data {data} --epochs 1 --batch-size 4 --attention softmax --depth 1 --device cpu --out".split()
          + [str(tmp_path / "runs")])  # fmt: skip
    table = tmp_path / "table.json"
    command = f"--runs {tmp_path / 'runs'} --data {data} --results {table} --images 8 --count 1 --iterations 4"
    landscape_table.main([*command.split(), "--directions", "1", "--device", "cpu", "--no-progress"])
    (run,) = (found := json.loads(table.read_text()))["runs"]
    assert run["data"] == {"name": "few", "split": "train", "images": 8, "img_size": 32} and run["largest"] > 0
    assert list(found["measures"]) == ["largest", "largest_plain", "largest_relative", "rise"]
    pixels(landscape_plots.sharpness(found))
    assert "explained_two" not in run and set(found["summary"]["softmax"]) == {
        "seeds", "test_accuracy", "loss", "largest", "largest_plain", "largest_relative", "rise"}  # fmt: skip
