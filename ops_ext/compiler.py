"""Compiles the kernels for this machine, once, and loads them; `python -m ops_ext` does so now and says what there is.

A library lies in the cache under a name made of everything it depends on: the sources, the flags, the compiler, what the
compiler sees of this CPU, the versions of torch and CUDA. Another machine, another compiler or another torch therefore looks
for another file; a compiler is needed even to find the name. A library is compiled beside its final name and moved there whole,
under a lock that the operating system drops with the process: of several processes one compiles and the others wait, and one
that is killed leaves nothing in the way.

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
CPU_FLAGS = ("-fPIC", "-shared", "-fvisibility=hidden")
# One binary for each generation since Turing, and intermediate code for what comes after Hopper.
GPU_ARCHITECTURES = ("75", "80", "86", "90")


class BuildError(RuntimeError):
    """Why there is no compiled library; the message carries the compiler's own words."""


def load(backend: str) -> bool:
    """Loads the library of one backend, compiled if the cache does not hold it; false if this process had loaded it before.

    Args:
        backend: "cpu", which brings the operators' schemas and comes first, or "cuda".

    Raises:
        BuildError: what `build` raises, or a library that does not load.
    """
    library = build(backend)
    if str(library) in torch.ops.loaded_libraries:  # by this module before it was reloaded, or by another copy of it
        return False
    if backend == "cpu" and hasattr(torch.ops.ops_ext, "upsample_argmax"):
        raise BuildError("another version of ops_ext is loaded in this process")
    try:
        torch.ops.load_library(library)
    except OSError:  # a damaged file: once more from the start
        with _errors_named():
            library.unlink(missing_ok=True)
            library = build(backend)
        try:
            torch.ops.load_library(library)
        except OSError as error:
            raise BuildError(str(error.__cause__ or error)) from error
    return True


def build(backend: str, extra_flags: Sequence[str] = ()) -> Path:
    """The library of one backend, compiled if the cache does not hold it.

    Args:
        backend: "cpu" or "cuda".
        extra_flags: further flags of the compiler.

    Raises:
        BuildError: no compiler, one that fails, or a cache that cannot be written.
    """
    with _errors_named():
        if backend == "cuda":
            return _build_cuda(extra_flags)
        return build_library("cpu", [FOLDER / "cpu.cpp", FOLDER / "blocks.cpp"], extra_flags)


def build_library(name: str, sources: Sequence[Path], extra_flags: Sequence[str] = ()) -> Path:
    """A library of C++ operators for this CPU, of sources and of the files that they include."""
    compiler = _compiler()
    native, machine = _this_cpu(compiler)
    flags = [*COMMON_FLAGS, *CPU_FLAGS, *native, *extra_flags]
    key = _key(name, sources, compiler, flags, machine)
    with _claim(key) as (library, partial):
        if partial is not None:
            _say(f"compiling the {name} kernels for this machine, once: about 10 s")
            units = [str(source) for source in sources if source.suffix == ".cpp"]
            _run([*compiler, *flags, *units, "-o", str(partial), *_torch_libraries("torch_cpu", "c10")])
    return library


def _build_cuda(extra_flags: Sequence[str]) -> Path:
    if torch.version.cuda is None:
        raise BuildError("this PyTorch is built without CUDA")
    nvcc, compiler = _nvcc(), _compiler()
    version = _run([nvcc, "--version"])
    if f"release {torch.version.cuda.split('.')[0]}." not in version:
        raise BuildError(f"{nvcc} is of another CUDA than PyTorch's {torch.version.cuda}: {version.strip().splitlines()[-1]}")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in GPU_ARCHITECTURES]
    targets.append(f"-gencode=arch=compute_{GPU_ARCHITECTURES[-1]},code=compute_{GPU_ARCHITECTURES[-1]}")
    host = ["-ccbin", compiler[0]] if len(compiler) == 1 else []
    flags = [*COMMON_FLAGS, "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0", *host, *targets, *extra_flags]
    machine = "\n".join([version, torch.version.cuda, _macros(compiler)])
    key = _key("cuda", [FOLDER / "cuda.cu"], [nvcc, *compiler], flags, machine)
    with _claim(key) as (library, partial):
        if partial is not None:
            _say("compiling the CUDA kernels, once: about 15 s")
            kernels = partial.with_name(f"{partial.name}.o")
            try:
                _run([nvcc, *flags, "-c", str(FOLDER / "cuda.cu"), "-o", str(kernels)])
                linked = [*_torch_libraries("torch_cpu", "torch_cuda", "c10"), _cuda_runtime()]
                _run([*compiler, "-shared", str(kernels), "-o", str(partial), *linked])
            finally:
                kernels.unlink(missing_ok=True)
    return library


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    if os.environ.get("OPS_EXT_CACHE"):
        return Path(os.environ["OPS_EXT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fast-scnn-ops_ext"


def _key(name: str, sources: Sequence[Path], compiler: Sequence[str], flags: Sequence[str], machine: str) -> str:
    parts = [source.read_text() for source in (*sources, FOLDER / "common.h")]
    parts += [*compiler, *flags, machine, torch.__version__, platform.machine(), *platform.libc_ver()]
    return f"{name}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}"


@contextlib.contextmanager
def _errors_named() -> Iterator[None]:
    """Whatever this machine refuses becomes a BuildError: a home that is not there, a folder that may not be read."""
    if os.name == "nt":
        raise BuildError("the kernels are not built on Windows")
    try:
        yield
    except BuildError:
        raise
    except OSError as error:
        raise BuildError(f"{error} (the cache can be moved by OPS_EXT_CACHE)") from error
    except (RuntimeError, ValueError) as error:  # of Path.home() and of shlex
        raise BuildError(str(error)) from error


@contextlib.contextmanager
def _claim(key: str) -> Iterator[tuple[Path, Path | None]]:
    """The library's path in the cache and, where it is not there yet, the path to write it to, while no other process does."""
    import fcntl

    folder = cache_folder()
    library = folder / f"{key}.so"
    if library.exists():
        yield library, None
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{key}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: two processes may compile, and each moves a whole file
        else:
            for left in folder.glob(f"{key}.*.partial*"):  # of a process that was killed
                left.unlink(missing_ok=True)
        if library.exists():
            yield library, None
            return
        partial = folder / f"{key}.{platform.node()}-{os.getpid()}.partial"
        try:
            yield library, partial
            os.replace(partial, library)
        finally:
            partial.unlink(missing_ok=True)


def _macros(compiler: Sequence[str], *flags: str) -> str:
    """The macros that the compiler defines: its name and version, and the instruction sets it may use."""
    return _run([*compiler, *flags, "-x", "c++", "-dM", "-E", "-"])


def _this_cpu(compiler: Sequence[str]) -> tuple[list[str], str]:
    """The flags that use all of this CPU's instruction sets, and the macros that then name them."""
    for flag in ("-march=native", "-mcpu=native"):  # the second is older Clang's on ARM
        with contextlib.suppress(BuildError):
            return [flag], _macros(compiler, flag)
    return [], _macros(compiler)


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
