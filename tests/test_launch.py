"""What every script begins and ends with: devices, processes, exit statuses."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import launch
from conftest import ROOT, run_ranks
from data import DataError
from launch import OneLineParser, UsageError, exit_status, gathered, start_processes


def fail(error):
    raise error


def test_what_the_user_can_mend_is_one_line_and_status_2(capsys):
    assert exit_status(lambda: None) == exit_status(lambda: 0) == 0 and exit_status(lambda: 75) == 75
    assert capsys.readouterr() == ("", "")
    for error, text in (
        (UsageError("--epochs 0; use 1"), "--epochs 0; use 1"),
        (DataError("a.png: is damaged"), "a.png: is damaged"),
        (FileNotFoundError("a.pth: no such checkpoint"), "a.pth: no such checkpoint"),
        (OSError(28, "No space left on device", "a.pth"), "[Errno 28] No space left on device: 'a.pth'"),
        (MemoryError(), "MemoryError()"),
        (torch.OutOfMemoryError("out of memory, tried to allocate 2 GiB"), "out of memory, tried to allocate 2 GiB"),
    ):
        assert exit_status(lambda: fail(error), (DataError,)) == 2  # noqa: B023
        line = capsys.readouterr().err
        assert line.endswith(f": {text}\n") and line.count("\n") == 1


def test_a_fault_of_the_program_keeps_its_traceback_and_ctrl_c_is_one_line(capsys):
    for error in (ValueError("x"), RuntimeError("y"), DataError("not named as the user's")):
        assert exit_status(lambda: fail(error)) == 1  # noqa: B023
        output = capsys.readouterr().err
        assert "Traceback" in output and output.rstrip().endswith(f"{type(error).__name__}: {error}")
    assert exit_status(lambda: fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.endswith(": interrupted\n")


def test_a_wrong_command_line_is_one_line(capsys):
    parser = OneLineParser()
    parser.add_argument("--epochs", type=int)
    unknown = "unrecognized arguments: --"
    cases = (["--epochs", "x"], "invalid int value: 'x'"), (["--speed"], f"{unknown}speed"), (["--epoch", "3"], unknown)
    for argv, text in cases:
        assert exit_status(lambda: parser.parse_args(argv)) == 2  # noqa: B023
        line = capsys.readouterr().err
        assert text in line and line.endswith("; --help lists all flags\n") and line.count("\n") == 1
    with pytest.raises(SystemExit) as end:
        exit_status(lambda: parser.parse_args(["--help"]))
    assert end.value.code == 0 and "--epochs" in capsys.readouterr().out


def test_an_error_in_a_loaders_worker_is_one_line(capsys):
    for error in (DataError("b.png: is damaged"), FileNotFoundError("b.png: no such file")):
        loader = torch.utils.data.DataLoader([error], collate_fn=lambda batch: fail(batch[0]), num_workers=1)
        assert exit_status(lambda: list(loader), (DataError,)) == 2  # noqa: B023
        line = capsys.readouterr().err
        assert line.endswith(f"{error}\n") and line.count("\n") == 1


def test_a_small_shared_memory_is_named(capsys):
    """/dev/shm of 64 MiB, as in a container of Docker: writing beyond its end is a bus error."""
    for number, text in ((signal.SIGBUS, ": /dev/shm is too small for the loader; use "), (signal.SIGSEGV, "")):
        loader = torch.utils.data.DataLoader([number], collate_fn=lambda batch: die(batch[0]), num_workers=1)
        assert exit_status(lambda: list(loader)) == (2 if text else 1)  # noqa: B023
        error = capsys.readouterr().err
        assert text in error and ("Traceback" in error) == (not text)


def die(number):
    os.kill(os.getpid(), number)
    time.sleep(60)


def test_missing_packages_and_ctrl_c_while_they_load_are_one_line(tmp_path):
    for content, status, text in (
        ("raise ModuleNotFoundError(\"No module named 'torch'\")", 2, "No module named 'torch'; bash run.sh installs"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
    ):
        (tmp_path / "torch.py").write_text(content)
        for script in ("train.py", "eval.py", *(f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py"))):
            environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
            command = [sys.executable, ROOT / script, "--help"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == status, script
            assert done.stderr.startswith(text) and done.stderr.count("\n") == 1, script


def test_cpus_are_those_of_affinity_and_of_the_containers_quota(tmp_path, monkeypatch):
    folder = tmp_path / "sys/fs/cgroup/job"
    folder.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    monkeypatch.setattr(launch, "Path", lambda path: Path(f"{tmp_path}/{path}"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    for quota, expected in (("250000 100000", 2), ("40000 100000", 1), ("max 100000", 6), ("900000 100000", 6)):
        (folder / "cpu.max").write_text(quota + "\n")
        assert launch.available_cpus() == expected
    (folder / "cpu.max").write_text("100000 100000\n")
    threads = torch.get_num_threads()
    try:
        start_processes("cpu")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def exchange():
    _, rank, world_size = start_processes("cpu")
    print(gathered([rank] * (2 - rank), world_size))
    dist.barrier()
    return 0


def fail_before_they_meet():
    return exit_status(lambda: fail(UsageError("--epochs 0; use 1")))


def fail_together():
    start_processes("cpu")
    return exit_status(lambda: fail(UsageError("--epochs 0; use 1")))


def fail_alone():
    """Process 0 has a reduction under way, in which process 1 waits for the next."""

    def main():
        _, rank, _ = start_processes("cpu")
        pending = dist.all_reduce(torch.ones(1000), async_op=True)
        if rank == 0:
            raise UsageError("a.png: is damaged")
        pending.wait()
        dist.all_reduce(torch.ones(1))

    return exit_status(main)


def test_lists_of_all_processes_are_gathered_in_the_order_of_ranks(tmp_path):
    assert gathered([1, 2], 1) == [1, 2]
    statuses, output = run_ranks(tmp_path, exchange)
    assert statuses == [0, 0] and output.count("[0, 0, 1]") == 2


@pytest.mark.parametrize("function", [fail_before_they_meet, fail_together, fail_alone])
def test_processes_report_an_error_once_and_do_not_abort(tmp_path, function):
    statuses, output = run_ranks(tmp_path, function)
    lines = [line for line in output.splitlines() if not re.match(r"\[(rank\d+\]:\[)?[WE]\d{4}", line)]  # PyTorch's log
    assert statuses[0] == 2 and len(lines) == 1, (statuses, output)
    assert lines[0].endswith(": a.png: is damaged" if function is fail_alone else ": --epochs 0; use 1")


def test_devices_that_are_not_there_are_refused(monkeypatch):
    assert start_processes("cpu") == (torch.device("cpu"), 0, 1)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert start_processes() == (torch.device("cpu"), 0, 1)
    for name in ("cuda", "cuda:0", "tpu", "cpu:x"):
        with pytest.raises(UsageError, match=f"--device {name} is not available; this machine has cpu"):
            start_processes(name)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="cuda:2 does not exist; start one process per device, or use --device cpu"):
        start_processes("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "3")  # the fourth process of a machine with two devices
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UsageError, match="cuda:3 does not exist"):
        start_processes()
    with pytest.raises(UsageError, match="--device cuda:0 puts all processes on one device; use --device cuda"):
        start_processes("cuda:0")


def test_restarts_that_would_look_for_earlier_processes_are_refused(monkeypatch):
    for name, value in {"RANK": "0", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="--max-restarts needs .* TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        start_processes("cpu")


def test_what_a_device_lacks_is_asked_of_the_device(monkeypatch):
    cpu = torch.device("cpu")
    assert launch.memory_format(cpu) == torch.channels_last and launch.name_of(cpu) == "cpu"

    def refuse(*_, **__):
        raise RuntimeError("only contiguous tensors")

    monkeypatch.setattr(torch, "empty", refuse)
    assert launch.memory_format(cpu) == torch.contiguous_format
    named = SimpleNamespace(get_device_name=lambda device: f"name of {device}")
    monkeypatch.setattr(torch, "get_device_module", lambda _: named)
    assert launch.name_of(torch.device("cuda:1")) == "name of cuda:1"


def test_an_old_torch_is_one_line():
    code = "import torch; torch.__version__ = '2.9.1+cu128'; import launch"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "torch 2.9.1+cu128 is too old, 2.11 is needed; bash run.sh installs it\n",
    )


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as where it is not installed

    def main():
        import tensorboard.data  # noqa: F401

    assert launch.exit_status(main) == 2
    error = capsys.readouterr().err
    assert error.endswith(": this needs the package tensorboard: pip install tensorboard\n") and error.count("\n") == 1
