"""Compiles the kernels for this machine and loads them, once; `python -m ops_ext` does so and reports.

A library lies in the cache under a name made of everything it depends on: the sources, the flags, the compiler, what the
compiler sees of this CPU, the versions of torch and CUDA. Another machine, another compiler or another torch therefore looks
for another file. A library is compiled beside its final name and moved there whole, under a lock that the operating system
drops with the process: of several processes one compiles and the others wait, and one that is killed leaves nothing in the way.

Environment: CXX, the C++ compiler; CUDA_HOME, where nvcc is looked for before PATH; OPS_EXT_CACHE, the cache's folder, else
`~/.cache/fast-scnn-ops_ext` (below XDG_CACHE_HOME where that is set).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
TORCH = Path(torch.__file__).resolve().parent
# The oldest torch whose stable ABI is used: 2.11.
COMMON_FLAGS = ("-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{TORCH / 'include'}")
CPU_FLAGS = ("-march=native", "-fPIC", "-shared", "-fvisibility=hidden")
# One binary for each generation since Turing, and intermediate code for what comes after Hopper.
GPU_ARCHITECTURES = ("75", "80", "86", "90")


class BuildError(RuntimeError):
    """Why there is no compiled library; the message carries the compiler's own words."""


def build(backend: str, extra_flags: Sequence[str] = ()) -> Path:
    """The library of one backend, compiled if the cache does not hold it.

    Args:
        backend: "cpu" or "cuda".
        extra_flags: further flags of the compiler.

    Raises:
        BuildError: no compiler, one that fails, or a cache that cannot be written.
    """
    if backend == "cuda":
        return _build_cuda(extra_flags)
    return build_library("cpu", [FOLDER / "cpu.cpp"], extra_flags)


def build_library(name: str, sources: Sequence[Path], extra_flags: Sequence[str] = ()) -> Path:
    """A library of C++ operators for this CPU: the first source compiled, the others those that it includes."""
    compiler = _compiler()
    flags = [*COMMON_FLAGS, *CPU_FLAGS, *extra_flags]
    # The predefined macros name the compiler, its version and the CPU's instruction sets.
    machine = _run([*compiler, "-march=native", "-x", "c++", "-dM", "-E", "-"])
    key = _key(name, sources, compiler, flags, machine)
    with _claim(key) as (library, partial):
        if partial is not None:
            _say(f"compiling the {name} kernels for this machine, once: about 5 s")
            _run([*compiler, *flags, str(sources[0]), "-o", str(partial), *_torch_libraries("torch_cpu", "c10")])
    return library


def _build_cuda(extra_flags: Sequence[str]) -> Path:
    if torch.version.cuda is None:
        raise BuildError("this PyTorch is built without CUDA")
    nvcc = _nvcc()
    version = _run([nvcc, "--version"])
    major = torch.version.cuda.split(".")[0]
    if f"release {major}." not in version:
        raise BuildError(f"{nvcc} is of another CUDA than PyTorch's {torch.version.cuda}: {version.strip().splitlines()[-1]}")
    compiler = _compiler()
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in GPU_ARCHITECTURES]
    targets.append(f"-gencode=arch=compute_{GPU_ARCHITECTURES[-1]},code=compute_{GPU_ARCHITECTURES[-1]}")
    flags = [*COMMON_FLAGS, "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0", *targets, *extra_flags]
    key = _key("cuda", [FOLDER / "cuda.cu"], [nvcc, *compiler], flags, version + torch.version.cuda)
    with _claim(key) as (library, partial):
        if partial is not None:
            _say("compiling the CUDA kernels, once: about 15 s")
            linked = [*_torch_libraries("torch_cpu", "torch_cuda", "c10"), _cuda_runtime()]
            kernels = partial.with_suffix(".o")
            try:
                _run([nvcc, *flags, "-c", str(FOLDER / "cuda.cu"), "-o", str(kernels)])
                _run([*compiler, "-shared", str(kernels), "-o", str(partial), *linked])
            finally:
                kernels.unlink(missing_ok=True)
    return library


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    if "OPS_EXT_CACHE" in os.environ:
        return Path(os.environ["OPS_EXT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fast-scnn-ops_ext"


def _key(name: str, sources: Sequence[Path], compiler: Sequence[str], flags: Sequence[str], machine: str) -> str:
    parts = [source.read_text() for source in (*sources, FOLDER / "common.h")]
    parts += [*compiler, *flags, machine, torch.__version__, platform.machine(), *platform.libc_ver()]
    return f"{name}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}"


@contextlib.contextmanager
def _claim(key: str) -> Iterator[tuple[Path, Path | None]]:
    """The library's path in the cache and, where it is not there yet, the path to write it to, while no other process does."""
    import fcntl  # not on Windows, where no compiler has been found by now

    folder = cache_folder()
    library = folder / f"{key}.so"
    if library.exists():
        yield library, None
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / f"{key}.lock", "w")
    except OSError as error:
        raise BuildError(
            f"cannot write the cache {folder} ({error.strerror}); set OPS_EXT_CACHE to a folder of yours"
        ) from None
    with lock:
        with contextlib.suppress(OSError):  # a file system without locks: two processes may compile, each moves a whole file
            fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            yield library, None
            return
        for left in folder.glob(f"{key}.*.partial*"):  # of a process that was killed
            left.unlink(missing_ok=True)
        partial = folder / f"{key}.{platform.node()}-{os.getpid()}.partial"
        try:
            yield library, partial
            os.replace(partial, library)
        except OSError as error:
            raise BuildError(f"cannot write the cache {folder}: {error}") from None
        finally:
            partial.unlink(missing_ok=True)


def _compiler() -> list[str]:
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler on PATH (c++, g++ or clang++); on Debian and Ubuntu install g++, or set CXX")


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise BuildError("no nvcc on PATH; install the CUDA toolkit or set CUDA_HOME")


def _cuda_runtime() -> str:
    """The CUDA runtime that torch has loaded into this process, wherever it was installed."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            path = line.split(maxsplit=5)[-1].strip()
            if Path(path).name.startswith("libcudart"):
                return path
    raise BuildError("PyTorch has loaded no CUDA runtime (libcudart)")


def _torch_libraries(*names: str) -> list[str]:
    return [f"-L{TORCH / 'lib'}", *(f"-l{name}" for name in names)]


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error.strerror}") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise BuildError("\n".join([f"{shlex.join(command)} failed:", *lines[:40]]))
    return done.stdout


def _say(text: str) -> None:
    print(f"ops_ext: {text}", file=sys.stderr, flush=True)
