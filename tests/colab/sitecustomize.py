"""Colab's side of a test kernel: `google.colab` is imported at start-up, and no installed `karat_lite` can be found."""

import importlib.machinery
import runpy
import sys
import types
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "offline" / "sitecustomize.py"))

google = sys.modules.setdefault("google", types.ModuleType("google"))
google.__path__ = getattr(google, "__path__", [])
google.colab = sys.modules["google.colab"] = types.ModuleType("google.colab")
google.colab.__spec__ = importlib.machinery.ModuleSpec("google.colab", None)

# An editable installation is a finder or a folder on the path; neither is there in Colab.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
sys.path[:] = [folder for folder in sys.path if not (Path(folder or ".") / "karat_lite").is_dir()]
