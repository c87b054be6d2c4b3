"""The repository's frame: every fact stands in one place, and what repeats it agrees with it."""

import ast
import importlib.metadata
import json
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

import build
from karat_lite.train import _parser

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [Requirement(line) for line in [*PROJECT["dependencies"], *sum(EXTRAS.values(), [])]]


def committed_files() -> list[Path]:
    """What git has, or would have after `git add .`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def texts() -> dict[str, str]:
    """The committed text files."""
    found = {}
    for path in committed_files():
        if b"\0" not in (content := path.read_bytes()):
            found[path.relative_to(ROOT).as_posix()] = content.decode("utf8")
    return found


# ---- dependencies ---------------------------------------------------------------------------------------------------


def test_environment_yml_repeats_nothing():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf8"))
    assert environment["name"] == PROJECT["name"]
    *conda, pip = environment["dependencies"]
    assert sorted(conda) == ["pip", f"python{PROJECT['requires-python']},<3.15"]
    assert pip == {"pip": ["-c .ci/constraints.txt", f"-e .[{','.join(EXTRAS)}]"]}


def test_constraints_pin_every_direct_dependency_within_its_range():
    lines = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf8").splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    versions = {canonicalize_name(name): version for name, version in pins}
    assert len(versions) == len(pins), "a package is pinned twice"
    assert canonicalize_name(PROJECT["name"]) not in versions
    for need in DIRECT:
        assert versions.get(canonicalize_name(need.name)) in need.specifier or pytest.fail(
            f"{need} is not met by the pin {versions.get(canonicalize_name(need.name))}"
        )


def test_no_dependency_is_listed_twice():
    names = [canonicalize_name(need.name) for need in DIRECT]
    assert sorted(names) == sorted(set(names))


def test_every_import_is_a_declared_dependency():
    declared = {canonicalize_name(need.name) for need in DIRECT}
    homes = importlib.metadata.packages_distributions()
    own = {"karat_lite", "google"} | {
        path.stem for folder in ("notebooks", "tests") for path in (ROOT / folder).glob("*.py")
    }
    for name, text in texts().items():
        cells = [text] if name.endswith(".py") else []
        if name.endswith(".ipynb"):
            cells = [cell.source for _, cell in build.hygiene.code_cells(nbformat.reads(text, as_version=4))]
        for node in (node for cell in cells for node in ast.walk(build.hygiene.parsed(cell))):
            modules = [item.name for item in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {module.split(".")[0] for module in modules} - own - set(sys.stdlib_module_names):
                assert {canonicalize_name(dist) for dist in homes.get(top, [])} & declared, f"{name} imports {top}"


# ---- what is committed ----------------------------------------------------------------------------------------------


def test_no_committed_file_names_a_folder_of_somebodys_machine():
    pattern = re.compile("/(?:wo" + "rk|ro" + "ot|ho" + "me)/" + r"[\w.]+")
    found = {name: pattern.search(text)[0] for name, text in texts().items() if pattern.search(text)}
    assert not found


def test_committed_data_is_described_and_small():
    described = (ROOT / "data" / "README.md").read_text(encoding="utf8")
    files = [path for path in committed_files() if path.parent.name in ("checkpoints", "trajectories", "results")]
    named = [f"{path.parent.name}/{path.name}" for path in files]
    assert [name for name in named if name not in described] == []
    assert sum(path.stat().st_size for path in files if path.parent.name != "results") <= 25e6


def test_downloads_stay_out_of_git():
    ours = ["data/README.md", "data/checkpoints/x.json", "data/trajectories/x.safetensors", "data/results/x.json"]
    downloads = ["data/svhn/test_32x32.mat", "data/cifar10/cifar-10-python.tar.gz.part", "data/imagenet/val/a/b.JPEG"]
    command = ["git", "check-ignore", *ours, *downloads]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split() == downloads


def test_notebooks_are_small_together():
    assert sum(path.stat().st_size for path in build.chosen(())) <= 12e6


def test_the_public_address_stands_in_one_place():
    """pyproject names it; only the README's badges and the notebooks repeat it, stamped by `make address`."""
    address = PROJECT["urls"]["Repository"]
    assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", address)
    files = texts()
    assert {name: build.strangers(text) for name, text in files.items() if build.strangers(text)} == {}
    holders = {name for name, text in files.items() if address in text and not name.endswith(".ipynb")}
    assert holders - {"README.md"} == {"pyproject.toml"}


def test_address_is_stamped_everywhere(tmp_path):
    """A new owner in pyproject reaches README, title cells and bootstrap cells, whatever stood there before."""
    copied = ["pyproject.toml", "README.md", *(f"notebooks/{path.name}" for path in (ROOT / "notebooks").iterdir())]
    for name in copied:
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    project = tmp_path / "pyproject.toml"
    for slug in ("someone/karat-lite", "another/renamed"):
        address = f"https://github.com/{slug}"
        project.write_text(re.sub(r"^Repository = .*$", f'Repository = "{address}"', project.read_text(), flags=re.M))
        subprocess.run([sys.executable, "notebooks/build.py", "address"], cwd=tmp_path, check=True, capture_output=True)
        for path in [tmp_path / "README.md", *tmp_path.glob("notebooks/*.ipynb")]:
            found = re.findall(
                r"(?:github\.com|colab\.research\.google\.com/github)/([\w.-]+/(?:karat-lite|renamed))\b",
                path.read_text(),
            )
            assert set(found) == {slug}, f"{path.name} names {set(found)}"


def test_the_readmes_picture_is_drawn_from_the_committed_checkpoints(tmp_path):
    build.overview(tmp_path / "overview.png")
    drawn, committed = (np.asarray(Image.open(folder / "overview.png").convert("RGB"), dtype=float)
                        for folder in (tmp_path, ROOT / "data" / "results"))  # fmt: skip
    assert drawn.shape == committed.shape and np.abs(drawn - committed).mean() < 1


def test_readme_maps_every_notebook_and_names_real_targets():
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    for path in build.chosen(()):
        assert f"notebooks/{path.name}" in readme, f"the README's map lacks {path.name}"
        assert f"colab.research.google.com/github/{build.slug()}/blob/main/notebooks/{path.name}" in readme
    for target in re.findall(r"`make ([\w-]+)|^\s*make ([\w-]+)", readme, flags=re.M):
        assert "".join(target) in targets(), f"the README names `make {''.join(target)}`"


def targets() -> set[str]:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf8"), flags=re.M)
    return set(phony[1].split())


def commands() -> list[tuple[str, str]]:
    """(file, arguments) of every call of the trainer that a reader or a results file is given."""
    texts = {path.name: path.read_text(encoding="utf8") for path in (ROOT / "README.md", ROOT / "data" / "README.md")}
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        texts[path.name] = "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
    for path in sorted((ROOT / "data" / "results").glob("*.json")):
        texts[path.name] = json.loads(path.read_text(encoding="utf8")).get("command", "") + "\n"
    pattern = re.compile(r"-m karat_lite\.train ([^`\n]*)")
    return [(name, found) for name, text in texts.items() for found in pattern.findall(text)]


@pytest.mark.parametrize("name, arguments", commands())
def test_commands_that_are_written_down_are_understood(name, arguments):
    _parser().parse_args(shlex.split(arguments.replace("...", "")))


def test_make_help_lists_every_target():
    said = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^make ([\w-]+)", said, flags=re.M)) == targets() - {"help"}
    assert {"tutorial", "lab", "test"} <= targets()


def test_workflow_follows_the_schema_and_runs_the_tests(tmp_path):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    workflow = ROOT / ".github" / "workflows" / "ci.yml"
    result = subprocess.run([*command, str(workflow)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    broken = tmp_path / "ci.yml"
    broken.write_text(workflow.read_text().replace("runs-on:", "runs-in:"))
    assert subprocess.run([*command, str(broken)], capture_output=True).returncode != 0
    assert "bash .ci/run" in workflow.read_text() and "cache: pip" in workflow.read_text()
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_ruff_finds_nothing():
    result = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# ---- the guard of tests/offline -------------------------------------------------------------------------------------

ATTEMPTS = """
import socket
attempts = {
    "connect": lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
    "connect_ex": lambda: socket.socket().connect_ex(("192.0.2.1", 80)),
    "IPv6": lambda: socket.socket(socket.AF_INET6).connect(("2001:db8::1", 80)),
    "datagram": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
    "name": lambda: socket.getaddrinfo("example.org", 80),
}
for name, attempt in attempts.items():
    try:
        attempt()
        print(name, "went out")
    except OSError as error:
        print(name, "refused" if "no network in tests" in str(error) else repr(error))
"""


def all_refused(said: str) -> bool:
    return len(said.splitlines()) == 5 and all(line.endswith(" refused") for line in said.splitlines())


def test_this_process_reaches_no_network(capsys):
    exec(ATTEMPTS, {})
    assert all_refused(capsys.readouterr().out)


def test_a_child_process_reaches_no_network():
    child = subprocess.run([sys.executable, "-c", ATTEMPTS], capture_output=True, text=True, check=True)
    assert all_refused(child.stdout), child.stdout
    git = subprocess.run(["git", "ls-remote", "https://192.0.2.1/x"], capture_output=True, text=True)
    assert "transport 'https' not allowed" in git.stderr


def test_loopback_stays_open():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5).close()
