"""Stand-ins for libcudart and libcuda, built for the torch that is installed, and how a process comes to use them.

torch's libraries import about a hundred functions of libcudart. Those that must answer stand in `stubs/cudart.c`. All
others are found with `nm` and succeed without doing anything, so the list follows torch's version.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

STUBS = Path(__file__).parent / "stubs"
ROOT = Path(__file__).resolve().parents[2]
_CUDART, _DRIVER = "libabsent_cudart.so", "libcuda.so.1"
_MARK = "PRX_ABSENT_GPU"


class AbsentGPUError(RuntimeError):
    """The absent GPU cannot be set up here; says in a sentence what is missing."""


def active() -> bool:
    """Whether this process was started with the stand-ins."""
    return _MARK in os.environ


def waits() -> int:
    """How often this process asked libcudart to wait for the device."""
    return int(_counter()())


@cache
def _counter() -> Any:
    count = ctypes.CDLL(os.environ[_MARK]).absent_gpu_waits
    count.restype = ctypes.c_longlong
    return count


def environment() -> dict[str, str]:
    """Environment variables for a process that shall see the absent GPU; builds the stand-ins where they are missing.

    Raises:
        AbsentGPUError: torch without CUDA, or no C compiler.
    """
    folder = _built()
    paths = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        **os.environ,
        "LD_PRELOAD": str(folder / _CUDART),
        "LD_LIBRARY_PATH": ":".join(path for path in paths if path),
        _MARK: str(folder / _CUDART),
        "OMP_NUM_THREADS": "1",
        # An installed toolkit is not to be found: its libraries would ask for a real driver.
        "CUDA_HOME": "/nonexistent",
    }


def restart(module: str, arguments: list[str]) -> None:
    """Go on as `python -m module arguments` under the stand-ins, in place of this process; does nothing below them."""
    if not active():
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment())


# --- building --------------------------------------------------------------------------------------------------------


def _built() -> Path:
    sources = [STUBS / "cudart.c", STUBS / "driver.c", STUBS / "crt" / "host_defines.h"]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in [*sources, Path(__file__)]))
    folder = ROOT / "build" / "absent_gpu" / f"torch-{version('torch')}-{key.hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            raise AbsentGPUError(f"the absent GPU needs {tool} to build its stand-ins; install gcc and binutils")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        _build(Path(made))
        try:
            os.replace(made, folder)
        except OSError:  # another process was quicker
            if not folder.is_dir():
                raise
        Path(made).mkdir(exist_ok=True)
    return folder


def _build(folder: Path) -> None:
    torch, headers = _torch_folder(), _headers()
    imported = _imported(torch)
    if not imported:
        raise AbsentGPUError(
            f"the absent GPU needs torch built for CUDA, and torch {version('torch')} imports nothing of libcudart; "
            "`uv sync` installs such a torch on Linux"
        )
    answered = set(re.findall(r"\b(cuda[A-Z]\w*)\(", (STUBS / "cudart.c").read_text()))
    answered |= set(re.findall(r"\b(?:OK|WAITS)\((cuda\w+)", (STUBS / "cudart.c").read_text()))
    rest = "".join(f"int {name}() {{ return 0; }}\n" for name in sorted(imported - answered))
    (folder / "rest.c").write_text(rest)
    shared = ["gcc", "-shared", "-fPIC", "-O1", "-w"]
    include = [f"-I{STUBS}", *(f"-I{path}" for path in headers)]
    _run([*shared, *include, "-o", str(folder / _CUDART), str(STUBS / "cudart.c"), str(folder / "rest.c")])
    _run([*shared, f"-Wl,-soname,{_DRIVER}", "-o", str(folder / _DRIVER), str(STUBS / "driver.c")])


def _torch_folder() -> Path:
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _headers() -> list[Path]:
    nvidia = _torch_folder().parent / "nvidia"
    found = sorted({path.parent for path in nvidia.glob("*/include/cuda_runtime_api.h")})
    if not found:
        raise AbsentGPUError(f"the absent GPU needs the CUDA headers of torch's wheels, and there are none in {nvidia}")
    return found


def _imported(torch: Path) -> set[str]:
    """Functions that torch's libraries import from libcudart, or from wherever the linker finds them."""
    libraries = [str(path) for path in sorted((torch / "lib").glob("*.so"))]
    listed = subprocess.run(["nm", "-D", "--undefined-only", *libraries], capture_output=True, text=True).stdout
    names = set(re.findall(r"\bU (cuda[A-Z]\w*)(?:@+libcudart\S*)?$", listed, re.MULTILINE))
    return names - {"cudaGetErrorName", "cudaGetErrorString"}  # the real ones answer without a driver


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise AbsentGPUError(f"the absent GPU's stand-ins do not compile: {done.stderr.strip()[-400:]}")
