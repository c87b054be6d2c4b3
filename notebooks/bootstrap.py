# Finds karat_lite: installed, in the folders above, or (in Colab) cloned beside this notebook. Safe to run twice.
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = os.environ.get("KARAT_LITE_REPO", "{repository}")


class Stop(Exception):
    def _render_traceback_(self):  # Jupyter prints this one line in place of a traceback
        return [f"Stop: {self}"]


def missing(*names):
    return [name for name in names if importlib.util.find_spec(name) is None]


if missing("karat_lite"):
    clone = Path("karat-lite").resolve()
    places = [Path.cwd(), *Path.cwd().parents, clone]
    home = next((place for place in places if (place / "karat_lite" / "__init__.py").is_file()), None)
    if home is None and "google.colab" not in sys.modules:
        raise Stop("karat_lite is not here: open this notebook inside its repository, or `pip install -e .` there.")
    if home is None and "/OWNER/" in REPOSITORY:
        raise Stop("this page has no address yet: set os.environ['KARAT_LITE_REPO'] to KArAt-lite's git URL and rerun.")
    if home is None:
        git = subprocess.run(["git", "clone", "-q", "--depth", "1", REPOSITORY, clone], capture_output=True, text=True)
        if git.returncode != 0:
            raise Stop(f"could not clone {REPOSITORY} (set KARAT_LITE_REPO?): {' '.join(git.stderr.split())}")
        home = clone
    sys.path.insert(0, str(home))
    if light := missing("accelerate", "einops", "safetensors", "tqdm"):  # torch and ipywidgets stay as they are
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", *light], check=True)
    importlib.invalidate_caches()

import karat_lite as kl
