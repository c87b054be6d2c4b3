"""Runs the notebooks, makes their pages, and writes and checks what is committed of them.

    python notebooks/build.py run --out build [00_quickstart ...]   smoke profile, pages and an index in build/
    python notebooks/build.py run --profile full -p PLAN=pico 05_training   another profile, other parameters
    python notebooks/build.py commit [00_quickstart ...]            reader profile, outputs written into the notebooks
    python notebooks/build.py check                                 the rules for committed notebooks
    python notebooks/build.py address                               pyproject's address into badges and bootstrap cells
    python notebooks/build.py overview                              the README's picture, from the committed checkpoints

A run ends with a non-zero status when a cell raises, and when a widget holds an error, which papermill does not see.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import nbformat

import hygiene

ROOT = hygiene.ROOT
FOLDER = ROOT / "notebooks"
CELL_TIMEOUT = {"smoke": 120, "reader": 1800, "full": 12 * 3600}  # seconds; papermill's own default is never
STARTS = 3  # kernels started side by side may be given the same port: one of them ends before its first cell
NOT_STARTED = "Kernel died before replying to kernel_info"


@dataclass
class Run:
    """One execution of one notebook: its cost, and what went wrong."""

    name: str
    out: Path
    profile: str
    seconds: float = 0.0
    megabytes: float = 0.0
    problems: list[str] = field(default_factory=list)


def execute(source: Path, out: Path, profile="smoke", parameters=(), cwd=FOLDER, env=None) -> Run:
    """Run a notebook by papermill in a process of its own; the memory is the peak of the largest process in it."""
    injected = [word for name, value in dict(parameters).items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", str(source), str(out), "--cwd", str(cwd), "--kernel", "python3"]
    command += ["--execution-timeout", str(CELL_TIMEOUT[profile]), "--no-progress-bar", *injected]
    run, start = Run(source.stem, out, profile), time.perf_counter()
    for _ in range(STARTS):
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            log.seek(0)
            said = log.read().strip().splitlines()
        if not any(NOT_STARTED in line for line in said):
            break
    run.seconds = time.perf_counter() - start
    run.megabytes = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)
    run.problems = list(hygiene.failures(nbformat.read(out, as_version=4))) if out.is_file() else []
    if any("CellTimeoutError" in line for line in said):
        run.problems.append(f"a cell took longer than {CELL_TIMEOUT[profile]} s and was stopped")
    elif process.returncode and not run.problems:  # no cell raised: a kernel that died, an output that is not valid
        why = [line for line in said if re.match(r"[\w.]*(Error|Exception)\b", line)] or said or ["it said nothing"]
        run.problems.append(f"papermill ended with {process.returncode}{cell_in_progress(out)}: {why[-1][:300]}")
    return run


def cell_in_progress(out: Path) -> str:
    """The cell that papermill was at when it ended."""
    cells = nbformat.read(out, as_version=4).cells if out.is_file() else []
    cells = [cell for cell in cells if not hygiene.added_by_papermill(cell)]
    states = [cell.metadata.get("papermill", {}).get("status", "pending") for cell in cells]
    begun = [i for i, state in enumerate(states, 1) if state != "pending"]
    return f" at cell {begun[-1]}" if begun else ""


def chosen(names) -> list[Path]:
    """The notebooks named on the command line, in reading order; all of them by default."""
    everything = {path.stem: path for path in sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))}
    wanted = [Path(name).stem for name in names] or list(everything)
    if unknown := [name for name in wanted if name not in everything]:
        sys.exit(f"no notebook {', '.join(unknown)}: there are {', '.join(everything)}")
    if not everything:
        sys.exit(f"there are no notebooks in {FOLDER.name}/")
    return [everything[name] for name in everything if name in wanted]


def each(paths, work, jobs: int = 1) -> list[Run]:
    """Run notebooks, `jobs` at a time, a line each; all problems are told at the end, and end the program."""
    runs, start = [], time.perf_counter()
    with ThreadPoolExecutor(jobs) as pool:
        done = pool.map(work, paths)
        for number, path in enumerate(paths, 1):
            print(f"[{number}/{len(paths)}] {path.stem:<24}", end="", flush=True)
            runs.append(run := next(done))
            verdict = "ok" if not run.problems else "FAILED"
            print(f"{run.seconds:6.1f} s {run.megabytes / 1000:6.2f} GB  {verdict}", flush=True)
    print(f"{len(runs)} notebooks in {time.perf_counter() - start:.0f} s")
    if failed := [f"{run.name}: {problem}" for run in runs for problem in run.problems]:
        sys.exit("\n".join(failed))
    return runs


def build(names, out: Path, jobs: int = 1, profile: str = "smoke", parameters=()) -> None:
    """Notebooks in a profile, an HTML page each; an index when all of them were run, and went well.

    parameters: words NAME=VALUE for the cell of that tag, in all notebooks that are run.
    """
    import pages

    given = {"PROFILE": profile}
    for word in parameters:
        name, is_there, value = word.partition("=")
        if not is_there or any(name not in parameters_of(path) for path in chosen(names)):
            sys.exit(f"-p {word}: expected NAME=VALUE, where NAME is a parameter of every notebook that is run")
        given[name] = value

    out.mkdir(parents=True, exist_ok=True)
    (out / "index.html").unlink(missing_ok=True)
    # Two kernels that both want all cores take longer than one after the other.
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else None

    one_page = Lock()

    def work(path):
        run = execute(path, out / path.name, profile, given, env=env)
        if run.out.is_file():
            with one_page:
                pages.page(nbformat.read(run.out, as_version=4), out / f"{path.stem}.html")
        return run

    runs = each(chosen(names), work, jobs)
    if not names:
        pages.index(runs, out / "index.html")
    print(f"Open {out / ('index.html' if not names else f'{runs[0].out.stem}.html')}")


def parameters_of(path: Path) -> set[str]:
    """What a notebook's cell of parameters sets."""
    ((_, cell),) = hygiene.tagged(nbformat.read(path, as_version=4), "parameters")
    return set(re.findall(r"^(\w+) = ", cell.source, flags=re.M))


def commit(names) -> None:
    """Every notebook in the reader profile; its outputs replace the committed ones if all is well, else nothing."""
    address()

    def work(path):
        source = nbformat.read(path, as_version=4)
        before = hygiene.fingerprint(source)
        with tempfile.TemporaryDirectory() as folder:
            run = execute(path, Path(folder) / path.name, "reader")  # nothing injected: reader is what the cell says
            if nbformat.read(path, as_version=4) != source or hygiene.fingerprint(source) != before:
                run.problems.append("the notebook or the package was edited during the run: run it again")
            if not run.problems:
                nb = hygiene.committed(source, nbformat.read(run.out, as_version=4))
                part = path.with_name(f".{path.name}.part")
                try:
                    nbformat.write(nb, part)
                    run.problems = hygiene.problems(part)
                    if not run.problems:
                        os.replace(part, path)
                finally:
                    part.unlink(missing_ok=True)
        return run

    each(chosen(names), work)


def check() -> None:
    """Print warnings for outputs older than the code, and end with the rules that are broken."""
    for path in chosen(()):
        if hygiene.stale(path):
            print(f"warning: {path.name}: the outputs are older than the code (make notebooks renews them)")
    found = [f"{path.name}: {problem}" for path in chosen(()) for problem in hygiene.problems(path)]
    readme = ROOT / "README.md"
    found += [f"{path.name}: {wrong} is not pyproject's address" for path in [readme, *chosen(())] if path.is_file()
              for wrong in strangers(path.read_text(encoding="utf8"))]  # fmt: skip
    if found:
        sys.exit("\n".join(found))
    print(f"{len(chosen(()))} notebooks keep the rules")


def overview(out: Path = ROOT / "data" / "results" / "overview.png") -> None:
    """The picture of the README: the class token's row in the last block of both twins, over one test image."""
    import torch

    import karat_lite as kl

    image, rows = 7, {}
    data = kl.load_dataset("shapes", "test", limit=image + 1)
    for name, checkpoint in {"softmax": "shapes_softmax", "Fourier-KArAt": "shapes_karat"}.items():
        with torch.no_grad():
            _, records = kl.load_checkpoint(checkpoint)[0](data[[image]][0], return_attention=True)
        rows[name] = records[-1].maps[0, :, 0, 1:]
    out.write_bytes(kl.widgets.render(kl.plots.attention_over_image(data.images[image], rows, grid=8)))


def slug() -> str:
    """owner/name, as it stands in pyproject's address."""
    return "/".join(hygiene.address().rstrip("/").split("/")[-2:])


def addresses(old: str = "") -> re.Pattern:
    """Any address of this repository on GitHub or in Colab, under any owner (or at `old`, where it was before)."""
    names = [rf"[\w.-]+/{re.escape(slug().split('/')[1])}", *([re.escape(old)] if old else [])]
    return re.compile(rf"(github\.com/|colab\.research\.google\.com/github/)({'|'.join(names)})\b")


def strangers(text: str) -> set[str]:
    """Addresses in a text that are of this repository, but not pyproject's."""
    return {found[2] for found in addresses().finditer(text)} - {slug()}


def address() -> None:
    """Write pyproject's address into the bootstrap cells and the badges; files that have it already are left alone."""
    readme = ROOT / "README.md"
    for path in [readme, *chosen(())]:
        if not path.is_file():
            continue
        before = path.read_text(encoding="utf8")
        if path == readme:
            old = old_slug(chosen(()))
            after = addresses(old).sub(lambda m: m[1] + slug(), before)
        else:
            nb = nbformat.reads(before, as_version=4)
            old = old_slug([path])
            for cell in nb.cells:
                if "bootstrap" in cell.metadata.get("tags", []):
                    cell.source = hygiene.bootstrap()
                elif cell.cell_type == "markdown":
                    cell.source = addresses(old).sub(lambda m: m[1] + slug(), cell.source)
            after = nbformat.writes(nb) + "\n"
        if after.rstrip() != before.rstrip():
            part = path.with_name(f".{path.name}.part")
            part.write_text(after, encoding="utf8")
            os.replace(part, path)
            print(f"{path.name}: the address is {hygiene.address()}")


def old_slug(paths) -> str:
    """owner/name that the first bootstrap cell still holds."""
    for path in paths[:1]:
        for _, cell in hygiene.tagged(nbformat.read(path, as_version=4), "bootstrap"):
            if found := re.search(r'"https://[\w.]+/([\w.-]+/[\w.-]+)"', cell.source):
                return found[1]
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="execute, in the smoke profile by default, and make pages")
    run.add_argument("--out", type=Path, default=ROOT / "build")
    run.add_argument("--jobs", type=int, default=2 if (os.cpu_count() or 1) > 1 else 1, help="at a time (%(default)s)")
    run.add_argument("--profile", default="smoke", choices=list(CELL_TIMEOUT))
    run.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE")
    run.add_argument("names", nargs="*")
    verbs.add_parser("commit", help="execute in the reader profile, in place").add_argument("names", nargs="*")
    verbs.add_parser("check", help="check the committed notebooks")
    verbs.add_parser("address", help="stamp pyproject's address")
    verbs.add_parser("overview", help="draw the README's picture")
    options = parser.parse_args()
    if options.verb == "run":
        if options.jobs < 1:
            parser.error(f"--jobs must be at least 1, given {options.jobs}")
        build(options.names, options.out, options.jobs, options.profile, options.parameters)
    elif options.verb == "commit":
        commit(options.names)
    else:
        {"check": check, "address": address, "overview": overview}[options.verb]()


if __name__ == "__main__":
    main()
