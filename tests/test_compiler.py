"""The kernels are compiled once for each machine, whatever happens to processes; without them the reference runs."""

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from ops_ext import compiler

COMPILER = next((shutil.which(name) for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on PATH")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("OPS_EXT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A source that compiles in no time."""
    source = tmp_path / "tiny.cpp"
    source.write_text("int answer() { return 42; }\n")
    return source


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch):
    """Makes CXX a script: the real compiler, after the given shell lines, which run for compilations alone."""

    def install(lines: str) -> Path:
        script = tmp_path / "fake-c++"
        script.write_text(f'#!/bin/sh\ncase "$*" in *-dM*) ;; *)\n{lines}\n;; esac\nexec {COMPILER} "$@"\n')
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return script

    return install


def in_processes(count: int, function) -> list[int]:
    """Runs function in forked processes, which are fast to start; their exit statuses."""
    children = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                function()
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command, environment = [sys.executable, *arguments], {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)


@needs_compiler
def test_where_there_is_a_compiler_the_kernels_run():
    done = run_python("-c", "import ops_ext; print(set(ops_ext.implementations('cpu').values()))")
    assert done.stdout == "{'cpu'}\n", done.stderr


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
def test_the_kernels_compile_for_lesser_cpus():
    command, _ = compiler._compiler()
    for source in compiler.FOLDER.rglob("*.cpp"):
        compiler._run([*command, "-mno-avx512f", "-fsyntax-only", str(source)])


@needs_compiler
def test_of_eight_processes_one_compiles(cache, tiny, fake_compiler, tmp_path):
    log = tmp_path / "log"
    fake_compiler(f"echo compiling >>{log}; sleep 0.3")
    assert in_processes(8, lambda: compiler.build(tiny)) == [0] * 8
    assert log.read_text() == "compiling\n"
    assert [path.suffix for path in sorted(cache.iterdir())] == [".lock", ".so"]


@needs_compiler
def test_a_killed_build_leaves_nothing_in_the_way(cache, tiny, fake_compiler, tmp_path):
    started = tmp_path / "started"
    # Half a library, as a killed linker leaves it.
    fake_compiler(
        f'for last; do case $before in -o) echo half >"$last" ;; esac; before=$last; done; touch {started}; sleep 60'
    )
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            compiler.build(tiny)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 30
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert list(cache.glob("*.partial")) and not list(cache.glob("*.so"))
    fake_compiler("")
    start = time.monotonic()
    library = compiler.build(tiny)
    assert time.monotonic() - start < 30
    assert library.read_bytes()[:4] == b"\x7fELF" and not list(cache.glob("*.partial*"))


@needs_compiler
def test_another_source_flag_compiler_cpu_or_torch_makes_another_library(cache, tiny, monkeypatch, tmp_path):
    libraries = {compiler.build(tiny)}
    assert libraries == {compiler.build(tiny)}
    libraries.add(compiler.build(tiny, ["-DOTHER"]))
    another_cpu = tmp_path / "another-cpu"  # the same command and version, another CPU behind -march=native
    for present in ("yes", "no"):
        another_cpu.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -D__FANCY_{present}__\n')
        another_cpu.chmod(0o755)
        monkeypatch.setenv("CXX", str(another_cpu))
        libraries.add(compiler.build(tiny))
    monkeypatch.delenv("CXX")
    tiny.write_text(tiny.read_text() + "// another\n")
    libraries.add(compiler.build(tiny))
    monkeypatch.setattr(torch, "__version__", "99.0")
    libraries.add(compiler.build(tiny))
    assert len(libraries) == 6


USE = """
import torch, ops_ext
logits, target = torch.arange(24.0).view(1, 2, 3, 4).sin(), torch.zeros(1, 9, 9, dtype=torch.uint8)
for _ in range(2):
    labels = ops_ext.upsample_argmax(logits, (9, 9))
    loss = ops_ext.upsample_cross_entropy(logits, target)
print(ops_ext.implementations("cpu")["upsample_argmax"])
print(labels.sum().item(), f"{loss.item():.5f}")
"""


@pytest.fixture(scope="module")
def usual() -> subprocess.CompletedProcess:
    return run_python("-c", USE)


@pytest.mark.parametrize(
    "environment, cause",
    [
        ({"CXX": "/nowhere/c++"}, "cannot run /nowhere/c++: No such file or directory"),
        ({"CXX": "false"}, "failed:"),
        (
            {"OPS_EXT_CACHE": "/proc/nothing"},
            "No such file or directory: '/proc/nothing' (OPS_EXT_CACHE moves the cache)",
        ),
        ({"PATH": "/nowhere", "CXX": ""}, "no C++ compiler on PATH"),
    ],
)
def test_without_kernels_the_results_are_the_same_and_one_message_says_why(tmp_path, usual, environment, cause):
    done = run_python("-c", USE, **{"OPS_EXT_CACHE": str(tmp_path), **environment})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "reference"
    assert done.stdout.splitlines()[1] == usual.stdout.splitlines()[1]
    assert done.stderr.count("no compiled kernels for cpu") == 1 and cause in done.stderr


def test_a_device_without_kernels_is_named_once():
    compiler._has_kernels.cache_clear()
    with pytest.warns(RuntimeWarning, match="no compiled kernels for meta.*only kernels for cpu and cuda"):
        assert not compiler.has_kernels("meta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not compiler.has_kernels("meta")


@needs_compiler
def test_a_failing_compiler_is_quoted(cache, tiny):
    tiny.write_text("int answer() { return forty_two; }\n")
    with pytest.raises(compiler.BuildError, match="forty_two"):
        compiler.build(tiny)
    assert not list(cache.glob("*.so")) and not list(cache.glob("*.partial"))


@needs_compiler
def test_a_damaged_library_is_compiled_again(cache, tiny, monkeypatch):
    monkeypatch.setattr(compiler, "FOLDER", tiny.parent)
    library = compiler.build(tiny)
    library.write_bytes(b"\x7fELF and nothing more")
    compiler.load("cpu")
    assert str(library) in torch.ops.loaded_libraries


@needs_compiler
def test_a_library_that_never_loads_is_reported_in_the_loaders_words(cache, tiny, fake_compiler, monkeypatch):
    fake_compiler('for last; do case $before in -o) echo text >"$last" ;; esac; before=$last; done; exit')
    monkeypatch.setattr(compiler, "FOLDER", tiny.parent)
    compiler._has_kernels.cache_clear()
    with pytest.warns(RuntimeWarning, match="no compiled kernels for cpu.*file too short"):
        assert not compiler.has_kernels("cpu")
    compiler._has_kernels.cache_clear()


@needs_compiler
def test_the_module_reports_what_it_loaded():
    done = run_python("-m", "ops_ext")
    assert done.returncode == 0 and "ops_ext: cpu kernels loaded from" in done.stdout, done.stdout + done.stderr
    done = run_python("-m", "ops_ext", CXX="/nowhere/c++")
    assert done.returncode == 1 and "no cpu kernels, plain PyTorch instead: cannot run /nowhere/c++" in done.stdout


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is built without CUDA")
def test_cuda_kernels_compile_and_load_where_the_toolkit_is():
    try:
        compiler._nvcc()
    except compiler.BuildError as error:
        pytest.skip(str(error))
    done = run_python("-c", "from ops_ext import compiler; compiler.load('cuda')")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is built without CUDA")
def test_a_toolkit_of_another_cuda_is_refused(tmp_path, monkeypatch):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 9.2, V9.2.148'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(compiler.BuildError, match=r"release 9.2"):
        compiler.load("cuda")
