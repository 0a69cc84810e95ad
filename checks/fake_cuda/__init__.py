"""A pretended CUDA GPU. Import this before torch: autograd's engine needs a device 0, or nothing runs backward there.

`guard.cpp` is compiled with g++ for the torch that is installed, into .cache.
"""

import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _compiled(package: Path) -> Path:
    """The guard for the torch in this folder, compiled unless it is there."""
    version = (package / "version.py").read_text().split("__version__ = '")[1].split("'")[0]
    library, source = ROOT / ".cache" / f"fake-cuda-guard-{version}.so", Path(__file__).with_name("guard.cpp")
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        library.parent.mkdir(exist_ok=True)
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{package}/include", f"-L{package}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run(["g++", str(source), "-o", str(library), *flags], check=True)
    return library


if "torch" in sys.modules:
    raise ImportError("import checks.fake_cuda before torch")
_package = Path(importlib.util.find_spec("torch").origin).parent
_library = _compiled(_package)
for _name in ("libc10.so", "libtorch_cpu.so"):
    ctypes.CDLL(str(_package / "lib" / _name), ctypes.RTLD_GLOBAL)
_guard = ctypes.CDLL(str(_library))
_guard.install_hooks()

import torch  # noqa: E402, F401 - after the hooks

_guard.install_guard()

from checks.fake_cuda.patches import fake_cuda  # noqa: E402

__all__ = ["fake_cuda"]
