"""Compiles the kernels for this machine, once, and loads them; `python -m ops_ext` does so now and says what there is.

Each source file becomes one library in the cache, under a name made of all that it depends on: the sources, the flags,
the compiler, what the compiler sees of this CPU, the version of torch. Another machine, compiler or torch looks for
another file. A library is written beside its final name and then renamed, under a lock that ends with the process: of
several processes one compiles and the others wait, and one that is killed leaves nothing in the way.

Environment: CXX, the C++ compiler; CUDA_HOME, where nvcc is looked for before PATH; OPS_EXT_CACHE, the cache's folder,
else `~/.cache/fast-scnn-ops_ext` (below XDG_CACHE_HOME where that is set).
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
TORCH = Path(torch.__file__).resolve().parent
# The oldest torch whose stable ABI is used: 2.11.
FLAGS = ("-std=c++20", "-O3", "-shared", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{TORCH / 'include'}")
CPU_FLAGS = ("-fPIC", "-fvisibility=hidden", "-march=native")
# The CUDA runtime is the one that PyTorch has loaded.
CUDA_FLAGS = ("-DUSE_CUDA", "--cudart=none", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0")
# From Turing on; what comes later translates the last one's intermediate code.
ARCHITECTURES = tuple(f"-gencode=arch=compute_{each},code=[sm_{each},compute_{each}]" for each in (75, 80, 90))
SUFFIXES = {"cpu": "cpp", "cuda": "cu"}


class BuildError(RuntimeError):
    """Why there is no compiled library; the message carries the compiler's own words."""


@torch.compiler.assume_constant_result
def has_kernels(device_type: str) -> bool:
    """Whether compiled kernels run on this type of device, after an attempt to get them; one warning says why not."""
    return _has_kernels(device_type)


@functools.cache
def _has_kernels(device_type: str) -> bool:
    try:
        load(device_type)
    except (OSError, RuntimeError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once, not once for each process of torchrun
            cause = (
                f"{error.__cause__ or error}{' (OPS_EXT_CACHE moves the cache)' if isinstance(error, OSError) else ''}"
            )
            warnings.warn(
                f"ops_ext: no compiled kernels for {device_type}; plain PyTorch runs instead, slower. Cause: {cause}",
                RuntimeWarning,
                stacklevel=4,
            )
        return False
    return True


def load(device_type: str) -> None:
    """Loads the libraries for a type of device, compiled where the cache does not hold them.

    Raises:
        BuildError: no kernels for such devices, no compiler, or one that fails.
        OSError: the cache cannot be written, or a library does not load.
    """
    if device_type not in SUFFIXES:
        raise BuildError("there are only kernels for cpu and cuda")
    sources = sorted(FOLDER.rglob(f"*.{SUFFIXES[device_type]}"))
    with ThreadPoolExecutor() as pool:
        libraries = list(pool.map(build, sources))
    for source, library in zip(sources, libraries):
        try:
            torch.ops.load_library(library)
        except OSError:  # a damaged file: once more from scratch
            library.unlink()
            torch.ops.load_library(build(source))


def build(source: Path, flags: Sequence[str] = (), depends_on: Sequence[Path] = ()) -> Path:
    """The library of one source file, compiled if the cache does not hold it.

    Args:
        source: a .cpp or .cu file.
        flags: further flags of the compiler.
        depends_on: what it includes beside headers of this package.
    """
    if os.name == "nt":
        raise BuildError("the kernels are not built on Windows")
    command, machine = _nvcc() if source.suffix == ".cu" else _compiler()
    files = [source, *sorted(FOLDER.rglob("*.h")), *depends_on]
    parts = [*command, *flags, machine, torch.__version__, *(file.read_text() for file in files)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    library = cache_folder() / f"{source.stem}-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        links = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", *(["-ltorch_cuda"] if source.suffix == ".cu" else [])]
        _compile(library, [*command, *flags, str(source), *links])
    return library


def _compile(library: Path, command: Sequence[str]) -> None:
    import fcntl

    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():  # another process was faster
            return
        print(f"ops_ext: compiling {library.stem.split('-')[0]} for this machine, once", file=sys.stderr, flush=True)
        partial = library.with_suffix(".partial")
        _run([*command, "-o", str(partial)])
        os.replace(partial, library)


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    if os.environ.get("OPS_EXT_CACHE"):
        return Path(os.environ["OPS_EXT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fast-scnn-ops_ext"


def _compiler() -> tuple[list[str], str]:
    """The C++ compiler with its flags, and the macros that tell its version and the CPU's instruction sets."""
    found = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if not found:
        raise BuildError("no C++ compiler on PATH (c++, g++ or clang++); on Debian and Ubuntu install g++, or set CXX")
    command = [*shlex.split(found), *FLAGS, *CPU_FLAGS]
    return command, _run([*command, "-x", "c++", "-dM", "-E", os.devnull])


def _nvcc() -> tuple[list[str], str]:
    """nvcc with its flags, and its version."""
    if torch.version.cuda is None:
        raise BuildError("this PyTorch is built without CUDA")
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(f"{home}/bin/nvcc" if home else "nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise BuildError("no nvcc on PATH; install the CUDA toolkit or set CUDA_HOME")
    version = _run([nvcc, "--version"])
    if f"release {torch.version.cuda.split('.')[0]}." not in version:
        raise BuildError(f"{nvcc} is of another CUDA than PyTorch's {torch.version.cuda}: {version.splitlines()[-1]}")
    return [nvcc, *FLAGS, *CUDA_FLAGS, *ARCHITECTURES], version


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error.strerror}") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise BuildError("\n".join([f"{shlex.join(command)} failed:", *lines[:40]]))
    return done.stdout
