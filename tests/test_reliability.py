"""What may happen to a long training: signals, kills, full disks, lost processes and numbers that are none."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import kills
import train
from conftest import ROOT, run_script
from model import read_checkpoint
from test_train import EVERYTHING, flags, records, run

PLAIN = {**os.environ, "OMP_NUM_THREADS": "1"}
WITH_MOUNTS = (
    "unshare",
    "--mount",
    "--map-root-user",
    "sh",
    "-c",
)  # as root of a name space, where a small disk can be mounted


def stop_after(monkeypatch, steps, what=train.Signals.STOP):
    """As if a signal, or the end of the minutes between checkpoints, came in the n-th step of this process."""
    count = iter(range(1, 10**6))
    monkeypatch.setattr(train.Signals, "_wish", lambda self: what if next(count) == steps else train.Signals.GO_ON)


def patched(folder, body):
    """train.py with some of it replaced, as a script for run_script."""
    script = folder / "patched.py"
    head = f"import sys; sys.path[:0] = [{str(ROOT)!r}]\nimport os, signal, time, torch\nimport train\nfrom eval import exit_status\n"
    script.write_text(f"{head}{body}\nsys.exit(exit_status('train.py', train.main))\n")
    return script


# ---------------------------------------------------------------------------------------------------------- exact resuming


@pytest.mark.parametrize("cache, workers, amp", [("none", 0, "off"), ("none", 2, "fp16"), ("device", 0, "bf16")])
def test_stopped_within_an_epoch_and_resumed_equals_uninterrupted(drawn, tmp_path, monkeypatch, capsys, cache, workers, amp):
    tmp_path = tmp_path / "mit Leerzeichen \u00e4\u4e2d"
    teacher = tmp_path / "teacher/checkpoints/1.pth"
    assert run(drawn, tmp_path / "teacher", epochs=1) == 0
    choices = {
        **EVERYTHING,
        "teacher": teacher,
        "dropout": 0.3,
        "epochs": 3,
        "log_every": 4,
        "cache": cache,
        "workers": workers,
        "amp": amp,
    }
    assert run(drawn, tmp_path / "whole", **choices) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 5)  # in epoch 2, between two log lines
        assert run(drawn, tmp_path / "cut", **choices) == train.STOPPED
    assert "stopped by SIGTERM, all is saved" in capsys.readouterr().out
    assert (tmp_path / "cut/checkpoints/1+2.pth").exists()
    assert read_checkpoint(tmp_path / "cut/checkpoints/1+2.pth")["tally"]["steps"] == 1
    assert run(drawn, tmp_path / "cut", **choices, resume="auto") == 0
    assert "1+2.pth after epoch 1 and 2 of 3 steps; changed: nothing" in capsys.readouterr().out
    assert kills.compare(tmp_path / "whole", tmp_path / "cut") == []


def test_two_processes_stopped_within_an_epoch_and_resumed_equal_uninterrupted(drawn, tmp_path):
    choices = {"epochs": 3, "dropout": 0.3, "ema": 0.9, "log_every": 5, "batch_size": 4, "workers": 1, "val_every": 3}
    assert run_script("train.py", *flags(drawn, tmp_path / "whole", **choices), processes=2).returncode == 0
    # One process alone gets the signal, in the first step: both stop after the same one.
    body = (
        "if os.environ['RANK'] == '1':\n"
        "    step = train.train_step\n"
        "    def once(*args): os.kill(os.getpid(), signal.SIGTERM); train.train_step = step; return step(*args)\n"
        "    train.train_step = once"
    )
    cut = run_script(patched(tmp_path, body), *flags(drawn, tmp_path / "cut", **choices), processes=2)
    assert "stopped by SIGTERM, all is saved" in cut.stdout and "exitcode  : 75" in cut.stderr, cut.stderr
    assert (tmp_path / "cut/checkpoints/0+2.pth").exists()
    done = run_script("train.py", *flags(drawn, tmp_path / "cut", **choices, resume="auto"), processes=2)
    assert done.returncode == 0, done.stderr
    assert kills.compare(tmp_path / "whole", tmp_path / "cut") == []


def test_another_number_of_processes_resumes_and_says_what_is_lost(drawn, tmp_path, monkeypatch):
    choices = {"epochs": 2, "freeze_bn": True, "dropout": 0, "log_every": 2}
    assert run(drawn, tmp_path / "whole", **choices) == 0
    stop_after(monkeypatch, 1)
    assert run(drawn, tmp_path / "cut", **choices) == train.STOPPED
    done = run_script("train.py", *flags(drawn, tmp_path / "cut", **choices, resume="auto"), processes=2)
    assert done.returncode == 0, done.stderr
    assert "0+1.pth after epoch 0 and 1 of 3 steps" in done.stdout
    assert "it was trained by 1 processes, now by 2" in done.stdout
    # The same batches, and the first step's loss counted once: the figures differ by rounding alone.
    a, b = ([r["loss"] for r in records(tmp_path / name, "train")] for name in ("whole", "cut"))
    assert b == pytest.approx(a, rel=1e-3)


def test_another_batch_goes_on_at_the_same_share_of_the_epoch(drawn, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert run(drawn, tmp_path / "r", epochs=1, batch_size=2) == train.STOPPED
    assert run(drawn, tmp_path / "r", epochs=1, batch_size=4, resume="auto") == 0
    out = capsys.readouterr().out
    assert "0+3.pth after epoch 0 and 3 of 6 steps; changed: batch_size 2 -> 4" in out
    assert "step 1/3" not in out and "step 2/3" in out


def test_checkpoints_by_the_clock_leave_only_the_newest(drawn, tmp_path):
    seen = []
    remove = train.remove_old

    def watched(folder, keep):
        remove(folder, keep)
        seen.append(sorted(path.name for path in folder.glob("*.pth")))

    train.remove_old = watched
    try:
        assert run(drawn, tmp_path / "r", epochs=3, save_minutes=1e-6, keep=1, save_every=2, val_every=5) == 0
    finally:
        train.remove_old = remove
    # After each step, the last of an epoch too; the whole epochs are kept, one of them here.
    assert seen[:3] == [["0+1.pth"], ["0+2.pth"], ["1.pth"]]
    assert seen[3:6] == [["1+1.pth", "1.pth"], ["1+2.pth", "1.pth"], ["2.pth"]]
    assert seen[6:] == [["2+1.pth", "2.pth"], ["2+2.pth", "2.pth"], ["3.pth"], ["3.pth", "best_model.pth"]]


# ----------------------------------------------------------------------------------------------------------------- signals


def wait_for(process, text):
    """Reads the process' output up to a line that contains the text."""
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"it ended with status {process.wait()} before {text!r}")


def test_signal_in_epochs_of_one_step_stops_before_the_validation(drawn, tmp_path, monkeypatch, capsys):
    choices = {"epochs": 4, "batch_size": 12, "val_every": 2, "save_every": 4}
    assert run(drawn, tmp_path / "whole", **choices) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run(drawn, tmp_path / "cut", **choices) == train.STOPPED
    assert [path.name for path in train.numbered_checkpoints(tmp_path / "cut/checkpoints")] == ["2.pth"]
    assert not records(tmp_path / "cut", "val")  # it is made up for
    assert run(drawn, tmp_path / "cut", **choices, resume="auto") == 0
    assert kills.compare(tmp_path / "whole", tmp_path / "cut") == []


def test_signalled_processes_leave_together_when_all_is_written(drawn, tmp_path):
    # As pkill does, which does not signal torchrun: it ends process 0, on a slow disk, when process 1 is gone.
    body = (
        "save, step = train.save, train.train_step\n"
        "def slow(*args): time.sleep(3); return save(*args)\n"
        "def once(*args): os.kill(os.getpid(), signal.SIGTERM); train.train_step = step; return step(*args)\n"
        "train.save, train.train_step = slow, once"
    )
    done = run_script(patched(tmp_path, body), *flags(drawn, tmp_path / "r", epochs=9, val_every=9), processes=2)
    assert "stopped by SIGTERM, all is saved" in done.stdout, done.stderr
    assert (tmp_path / "r/checkpoints/0+2.pth").exists()


def test_signal_while_an_image_is_decoded_is_no_fault_of_the_image(drawn, tmp_path, monkeypatch, capsys):
    turn, signals = data._turn, []
    enter = train.Signals.__enter__
    monkeypatch.setattr(train.Signals, "__enter__", lambda self: signals.append(self) or enter(self))

    def signalled(image):
        if signals and signals[0].raises:  # within a validation
            os.kill(os.getpid(), signal.SIGTERM)
        return turn(image)

    monkeypatch.setattr(data, "_turn", signalled)
    assert run(drawn, tmp_path / "r", epochs=1) == train.STOPPED
    assert "stopped by SIGTERM, all is saved" in capsys.readouterr().out
    monkeypatch.undo()
    assert run(drawn, tmp_path / "r", epochs=1, resume="auto") == 0
    assert len(records(tmp_path / "r", "val")) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_everybody_saves_and_says_how_to_go_on(drawn, tmp_path, number):
    argv = [sys.executable, ROOT / "train.py", *flags(drawn, tmp_path / "r", epochs=500, val_every=500, workers=1)]
    process = kills.start(list(map(str, argv)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(process, "step 5/")
    os.killpg(process.pid, number)  # as a terminal does, or systemd: the loader's workers get it too
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (train.STOPPED, "")
    assert f"stopped by {signal.Signals(number).name}, all is saved; the same flags with --resume auto go on" in out
    (path,) = (p for p in train.numbered_checkpoints(tmp_path / "r/checkpoints")[-1:])
    last = records(tmp_path / "r", "train")[-1]["step"]
    assert 3 * train.position(path)[0] + train.position(path)[1] == last >= 5


def test_signal_to_torchrun_stops_all_processes_after_the_same_step(drawn, tmp_path):
    argv = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py")]
    argv += flags(drawn, tmp_path / "r", epochs=500, val_every=500, workers=1)
    process = kills.start([sys.executable, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(process, "step 5/")
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert "stopped by SIGTERM, all is saved" in out and "lost another process" not in out, out
    epoch, steps = train.position(train.numbered_checkpoints(tmp_path / "r/checkpoints")[-1])
    assert 3 * epoch + steps == records(tmp_path / "r", "train")[-1]["step"]


def test_signal_during_validation_leaves_at_once_with_the_epoch_saved(drawn, tmp_path):
    body = "train.evaluate = lambda *args, **options: time.sleep(60)"
    argv = [sys.executable, patched(tmp_path, body), *flags(drawn, tmp_path / "r", epochs=1)]
    process = kills.start(list(map(str, argv)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(process, "step 3/3")
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (train.STOPPED, "") and "stopped by SIGTERM" in out
    assert run(drawn, tmp_path / "r", epochs=1, resume="auto") == 0
    assert [r["epoch"] for r in records(tmp_path / "r", "val")] == [1]


def test_second_signal_leaves_at_once_but_a_terminals_double_does_not(drawn, tmp_path):
    body = "train.train_step = lambda *args: (print('begun', flush=True), [time.sleep(0.1) for _ in range(600)])"
    argv = [sys.executable, patched(tmp_path, body), *flags(drawn, tmp_path / "r")]
    process = kills.start(list(map(str, argv)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(process, "begun")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 128 + signal.SIGTERM
    process.communicate()


def test_two_runs_never_write_to_the_same_folder(drawn, tmp_path, capsys):
    argv = [sys.executable, ROOT / "train.py", *flags(drawn, tmp_path / "r", epochs=2000, val_every=2000)]
    process = subprocess.Popen(list(map(str, argv)), stdout=subprocess.PIPE, text=True, env=PLAIN, cwd=ROOT)
    try:
        wait_for(process, "step 2/")
        for resume in (None, "auto"):
            assert run(drawn, tmp_path / "r", resume=resume) == 2
            assert f"{tmp_path / 'r'}: another run is writing there; give another --out" in capsys.readouterr().err
        wait_for(process, "step ")
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert process.returncode == train.STOPPED and not (tmp_path / "r/earlier").exists()
    finally:
        process.kill()
    assert run(drawn, tmp_path / "r", epochs=1) == 0  # and nothing is left of it afterwards


@pytest.mark.parametrize("flag", ["teacher", "init_weights"])
def test_weights_that_the_run_would_replace_are_refused(drawn, tmp_path, capsys, flag):
    assert run(drawn, tmp_path / "r", epochs=1) == 0
    best = tmp_path / "r/checkpoints/best_model.pth"
    assert run(drawn, tmp_path / "r", **{flag: best}) == 2
    assert "lies in this run's own --out" in capsys.readouterr().err and best.exists()
    assert run(drawn, tmp_path / "other", epochs=1, **{flag: best}) == 0


# ------------------------------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize("processes, count", [(1, 4), (2, 2)])
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(drawn, tmp_path, processes, count):
    result = kills.survive(drawn, tmp_path, count, processes, seed=processes)
    assert result["differences"] == [] and result["kills"] == count, result


@pytest.mark.parametrize("when", ["half written", "written", "renamed"])
def test_killed_within_writing_a_checkpoint(drawn, tmp_path, when):
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    if when == "half written":
        body = f"""
import io
whole = train.save
def half(checkpoint, path):
    if checkpoint["epoch"] == 2 and path.name == "2.pth":
        content = io.BytesIO()
        torch.save(checkpoint, content)
        path.with_name(".2.pth.tmp").write_bytes(content.getvalue()[: content.tell() // 2]); {kill}
    whole(checkpoint, path)
train.save = half"""
    else:
        order = f"{kill}; replace(a, b)" if when == "written" else f"replace(a, b); {kill}"
        body = f"""
replace = os.replace
def killed(a, b):
    if b.name == "2.pth":
        {order}
    replace(a, b)
os.replace = killed"""
    assert run(drawn, tmp_path / "whole", epochs=3) == 0
    done = run_script(patched(tmp_path, body), *flags(drawn, tmp_path / "cut", epochs=3))
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = sorted(path.name for path in (tmp_path / "cut/checkpoints").iterdir())
    assert left == (["1.pth", "2.pth", "best_model.pth"] if when == "renamed" else [".2.pth.tmp", "1.pth", "best_model.pth"])
    assert run(drawn, tmp_path / "cut", epochs=3, resume="auto") == 0
    assert kills.compare(tmp_path / "whole", tmp_path / "cut") == []


# ------------------------------------------------------------------------------------------------------------------- disks


def test_disk_that_fills_leaves_the_last_good_checkpoint(drawn, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    body = f"""
import pathlib, shutil, signal, subprocess, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
train = [sys.executable, {str(ROOT / "train.py")!r}, *sys.argv[1:]]
done = subprocess.run(train, capture_output=True, text=True)
print(done.stderr, done.returncode, sorted(path.name for path in pathlib.Path({str(disk / "r/checkpoints")!r}).iterdir()))
pathlib.Path({str(disk / "ballast")!r}).unlink()
done = subprocess.run([*train, "--resume", "auto"], capture_output=True, text=True)
print(done.stderr, done.returncode, done.stdout)
shutil.copytree({str(disk / "r")!r}, {str(tmp_path / "kept")!r})
"""
    # Room for two checkpoints of 9.4 MiB and the best model, not for a third.
    shell = f'mount -t tmpfs -o size=48m tmpfs {disk} && head -c 18M /dev/zero > {disk}/ballast && exec "$@"'
    command = [*WITH_MOUNTS, shell, "sh", sys.executable, "-c", body]
    try:
        probe = subprocess.run([*WITH_MOUNTS, f"mount -t tmpfs tmpfs {disk}"], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no program unshare here, to mount a small disk with")
    if probe.returncode:
        pytest.skip("this system lets nobody mount a small disk")
    assert run(drawn, tmp_path / "whole", epochs=4) == 0
    done = subprocess.run(
        [*command, *flags(drawn, disk / "r", epochs=4)], capture_output=True, text=True, env=PLAIN, timeout=120
    )
    first, second = done.stdout.strip().splitlines()[:2], done.stdout
    assert re.fullmatch(rf"train.py: {disk}/r/checkpoints/\S+\.pth: no space left on device; .*", first[0]), done
    assert first[1].strip().startswith("2 ['") and ".tmp" not in first[1], done
    assert " 0 " in second and "done: best mIoU" in second, done
    assert kills.compare(tmp_path / "whole", tmp_path / "kept") == []


def test_output_that_cannot_be_written_is_one_line_before_the_first_step(drawn, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    for out, reason in ((tmp_path / "file" / "runs", "not a directory"), (Path("/proc/runs"), "no such file or directory")):
        assert run(drawn, out) == 2
        captured = capsys.readouterr()
        assert (
            re.fullmatch(rf"train.py: {out}\S*: {reason}; give another path.*\n", captured.err) and "step" not in captured.out
        )
    argv = [sys.executable, ROOT / "train.py", *flags(drawn, tmp_path / "r")]
    done = subprocess.run(
        [*WITH_MOUNTS, f'mount -t tmpfs -o ro tmpfs {tmp_path} && exec "$@"', "sh", *argv],
        capture_output=True, text=True, env=PLAIN, timeout=60,
    )  # fmt: skip
    if "mount" not in done.stderr and "unshare" not in done.stderr:
        assert done.returncode == 2 and f"{tmp_path}/r" in done.stderr and "read-only file system" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------ lost processes


def test_a_restart_goes_on_from_checkpoints_of_its_own_launch_alone(drawn, tmp_path, monkeypatch, capsys):
    def start(launch, count, **choices):
        environment = {"ERROR_FILE": f"/tmp/torchelastic_x/{launch}/attempt_{count}/0/error.json", "RESTART_COUNT": count}
        for name, value in {**environment, "MAX_RESTARTS": 3, "RUN_ID": "none"}.items():
            monkeypatch.setenv(f"TORCHELASTIC_{name}", str(value))
        assert run(drawn, tmp_path / "r", **choices) == 0
        return capsys.readouterr().out

    assert "resumed" not in start("none_a", 0, epochs=1)
    assert "resumed" not in start("none_b", 1, epochs=1)  # another launch, killed before it had a checkpoint
    assert "1.pth after epoch 1" in start("none_b", 2, epochs=2)
    assert "1.pth after epoch 1" not in start("none_c", 0, epochs=2)
    assert "2.pth after epoch 2" in start("none_d", 0, epochs=2, resume="auto")


def test_newer_checkpoints_on_another_machine_than_that_of_process_0_are_said(tmp_path):
    old, new = Path("a/3.pth"), Path("b/3+1.pth")
    train.check_machines(Path("a"), [[], []])
    train.check_machines(Path("a"), [[new], [new], [], [old]])
    for newest in ([[], [old]], [[old], [new]]):
        with pytest.raises(train.UsageError, match=f"{newest[1][0].name.replace('+', '.')} of process 1 is newer"):
            train.check_machines(Path("a"), newest)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("damage", ["shape", "missing", "other", "parameter"])
def test_optimiser_state_that_does_not_fit_is_refused(drawn, tmp_path, capsys, optimizer, damage):
    assert run(drawn, tmp_path / "r", epochs=1, optimizer=optimizer) == 0
    path = tmp_path / "r/checkpoints/1.pth"
    checkpoint = torch.load(path, weights_only=True)
    name = "momentum_buffer" if optimizer == "sgd" else "exp_avg"
    states = checkpoint["optimizer"]["state"]
    if damage == "shape":
        states[0][name] = torch.zeros(3)
    elif damage == "missing":
        del states[0][name]
    elif damage == "other":
        states[0][name] = "zeros"
    else:
        del states[0]
    train.save(checkpoint, path)
    assert run(drawn, tmp_path / "r", epochs=2, optimizer=optimizer, resume="auto") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "1.pth: its optimiser's state" in error


def test_finished_run_that_lost_its_best_model_makes_it_again(drawn, tmp_path, capsys):
    assert run(drawn, tmp_path / "r", epochs=1) == 0
    best = tmp_path / "r/checkpoints/best_model.pth"
    miou = read_checkpoint(best)["miou"]
    best.write_bytes(best.read_bytes()[:1000])
    assert run(drawn, tmp_path / "r", epochs=1, resume="auto") == 0
    assert read_checkpoint(best)["miou"] == miou


def test_bytes_that_are_no_text_in_the_records_do_not_end_a_resumed_run(drawn, tmp_path):
    assert run(drawn, tmp_path / "r", epochs=1) == 0
    with open(tmp_path / "r/logs/metrics.jsonl", "ab") as file:
        file.write(b"\xff\xfe\n")
    assert run(drawn, tmp_path / "r", epochs=2, resume="auto") == 0
    assert len(records(tmp_path / "r", "val")) == 2


def test_more_steps_than_an_epoch_has_are_no_position(drawn, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert run(drawn, tmp_path / "r") == train.STOPPED
    path = tmp_path / "r/checkpoints/0+1.pth"
    train.save({**torch.load(path, weights_only=True), "steps": 3}, path)
    assert run(drawn, tmp_path / "r", resume=path) == 2
    assert "has done 3 steps of an epoch, more than it has" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["train_step", "validate"])
def test_killed_loader_worker_is_one_line(drawn, tmp_path, where):
    body = (
        f"import multiprocessing\nbefore = train.{where}\n"
        "def killing(*args):\n"
        "    for each in multiprocessing.active_children(): os.kill(each.pid, signal.SIGKILL)\n"
        "    time.sleep(1)\n"
        "    return before(*args)\n"
        f"train.{where} = killing"
    )
    done = run_script(patched(tmp_path, body), *flags(drawn, tmp_path / "r", epochs=2, workers=2))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "a decoding process was killed, mostly for lack of memory" in done.stderr


def test_rank_without_the_rest_of_torchruns_environment_is_one_line(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert run(drawn, tmp_path / "r") == 2
    assert "RANK is set, but not MASTER_ADDR, MASTER_PORT, WORLD_SIZE" in capsys.readouterr().err


def test_killed_rank_is_made_up_for_by_torchruns_restarts(drawn, tmp_path):
    # Process 1 dies in the fifth step of each of the first two lives, and of the next one with it.
    body = (
        "step, count = train.train_step, iter(range(100))\n"
        "def dying(*args):\n"
        "    if os.environ['RANK'] == '1' and int(os.environ['TORCHELASTIC_RESTART_COUNT']) < 2 and next(count) == 4:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(*args)\n"
        "train.train_step = dying"
    )
    out = tmp_path / "r"
    options = {"epochs": 4, "save_minutes": 1e-6, "val_every": 4}
    assert run(drawn, out, epochs=1) == 0  # another run, which the restart must not take for its own
    whole = run_script("train.py", *flags(drawn, tmp_path / "whole", **options), processes=2)
    assert whole.returncode == 0, whole.stderr
    argv = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3", patched(tmp_path, body)]
    done = subprocess.run(
        [sys.executable, *map(str, argv), *flags(drawn, out, **options)], capture_output=True, text=True, env=PLAIN, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resumed ") == 2 and "done: best mIoU" in done.stdout
    assert [r["step"] for r in records(out, "train")] == list(range(1, 13))
    assert len(list((out / "earlier").iterdir())) == 1
    shutil.rmtree(out / "earlier")
    assert kills.compare(tmp_path / "whole", out) == []


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def nodes(port, script, argv, processes=(1, 1), **options):
    """Two torchrun agents of so many processes, as on two machines."""
    common = ["-m", "torch.distributed.run", "--nnodes=2", "--rdzv_backend=c10d", "--rdzv_id=test"]
    rest = [f"--rdzv_endpoint=localhost:{port}", str(script), *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return [kills.start([sys.executable, *common, f"--nproc_per_node={n}", *rest], **pipes, **options) for n in processes]


def test_two_nodes_train_and_agree_on_the_resumed_step(drawn, tmp_path):
    choices = {"epochs": 2, "ema": 0.9}
    for resume in (None, "auto"):
        argv = flags(drawn, tmp_path / "r", **{**choices, "epochs": 1 if resume is None else 2}, resume=resume)
        pair = nodes(free_port(), ROOT / "train.py", argv)
        outputs = [process.communicate(timeout=120)[0] for process in pair]
        assert [process.returncode for process in pair] == [0, 0], outputs
    assert sum("resumed " in output for output in outputs) == 1, "process 0 alone says it"
    assert [r["step"] for r in records(tmp_path / "r", "train")] == [1, 2, 3, 4, 5, 6]


def test_nodes_of_one_and_of_two_processes_share_caches_of_their_own(drawn, tmp_path):
    argv = flags(drawn, tmp_path / "r", epochs=1, batch_size=6, cache="ram")
    pair = nodes(free_port(), ROOT / "train.py", argv, (1, 2))
    outputs = [process.communicate(timeout=120)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert [r["step"] for r in records(tmp_path / "r", "train")] == [1, 2]


def test_lost_node_ends_the_other_in_bounded_time_with_a_message(drawn, tmp_path):
    pair = nodes(free_port(), ROOT / "train.py", flags(drawn, tmp_path / "r", epochs=500, val_every=500))
    first = next(process for process in pair if _is_first(process))
    other = next(process for process in pair if process is not first)
    kills.kill_all(other)
    begun = time.monotonic()
    out, _ = first.communicate(timeout=90)
    assert first.returncode != 0 and time.monotonic() - begun < 60
    assert "train.py: lost another process (" in out and "--resume auto goes on from the newest checkpoint" in out
    assert "Traceback" not in out.split("train.py: lost another process")[0]


def _is_first(process):
    """Whether the lines of process 0 come from this one; waits for the training to begin."""
    os.set_blocking(process.stdout.fileno(), False)
    for _ in range(300):
        line = process.stdout.readline()
        if "step 3/" in line:
            os.set_blocking(process.stdout.fileno(), True)
            return True
        if not line:
            time.sleep(0.1)
            if not hasattr(process, "waited"):
                process.waited = 0
            process.waited += 1
            if process.waited > 120:
                break
    os.set_blocking(process.stdout.fileno(), True)
    return False


def test_silent_process_ends_the_others_after_the_timeout(drawn, tmp_path):
    body = "if os.environ['RANK'] == '1': train.train_step = lambda *args: time.sleep(300)"
    begun = time.monotonic()
    done = run_script(patched(tmp_path, body), *flags(drawn, tmp_path / "r", peer_timeout=0.1), processes=2, timeout=120)
    assert done.returncode != 0 and time.monotonic() - begun < 90
    assert "train.py: lost another process (" in done.stderr and re.search("timed out|timeout", done.stderr.lower()), (
        done.stderr
    )


# -------------------------------------------------------------------------------------------------------------- divergence


def loss_with(values):
    """The loss of the n-th step times the n-th value."""
    plain, factors = train.Objective.__call__, iter(values)
    return lambda *args, **options: plain(*args, **options) * next(factors)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_steps_without_a_finite_loss_are_skipped_as_if_they_had_not_been(
    drawn, tmp_path, monkeypatch, capsys, bad, amp, optimizer
):
    choices = {"epochs": 1, "batch_size": 4, "ema": 0.5, "amp": amp, "optimizer": optimizer, "dropout": 0, "save_minutes": 1e-6}
    monkeypatch.setattr(train.Objective, "__call__", loss_with([bad, 1, bad]))
    states = []
    monkeypatch.setattr(train.Writer, "save", lambda self, state, *_: states.append(train.detached(state)))
    assert run(drawn, tmp_path / "r", **choices) == 0
    start, second, end = states[0], states[1], states[2]
    assert torch.equal(end["tally"]["skipped"], torch.tensor([0, 1, 0, 2]))
    # The first step left no trace but its count; the third left what the second had made of it.
    fresh = train.FastSCNN(19, aux=True, dropout=0)
    for name, value in start["trained"].items():
        norm = name.endswith(("running_mean", "running_var"))
        assert not norm or torch.equal(value, fresh.state_dict()[name]), name
    for name, value in second["trained"].items():
        assert name.endswith("num_batches_tracked") or torch.equal(value, end["trained"][name]), name
    assert any(not torch.equal(value, start["trained"][name]) for name, value in second["trained"].items())
    for before, after in zip(*(state["optimizer"]["state"].values() for state in (second, end))):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(value).all() for value in end["model"].values())
    losses = [(r["loss"] is None, r["skipped"]) for r in records(tmp_path / "r", "train")]
    assert losses == [(True, 1), (False, 0), (True, 1)]
    assert capsys.readouterr().out.count("skipped 1 steps") == 2


def test_momenta_are_defined_after_a_first_step_that_is_skipped(drawn, tmp_path, monkeypatch):
    # PyTorch's fused SGD makes them without values and then does not write them.
    monkeypatch.setattr(train.Objective, "__call__", loss_with([math.nan] * 3))
    assert run(drawn, tmp_path / "r", epochs=1) == 0
    momenta = [s["momentum_buffer"] for s in read_checkpoint(tmp_path / "r/checkpoints/1.pth")["optimizer"]["state"].values()]
    assert len(momenta) > 100 and not any(m.any() for m in momenta)


def test_two_processes_skip_together(drawn, tmp_path):
    body = (
        "plain, calls = train.Objective.__call__, iter(range(1000))\n"
        "def bad(*args, **options):\n"
        "    return plain(*args, **options) * (float('nan') if os.environ['RANK'] == '1' and next(calls) in (1, 2) else 1)\n"
        "train.Objective.__call__ = bad"
    )
    options = {"epochs": 2, "val_every": 2, "ema": 0.9}
    done = run_script(patched(tmp_path, body), *flags(drawn, tmp_path / "r", **options), processes=2)
    assert done.returncode == 0, done.stderr
    assert [(r["step"], r["skipped"]) for r in records(tmp_path / "r", "train")] == [
        (1, 0),
        (2, 1),
        (3, 1),
        (4, 0),
        (5, 0),
        (6, 0),
    ]
    assert all(torch.isfinite(v).all() for v in read_checkpoint(tmp_path / "r/checkpoints/2.pth")["model"].values())


def test_a_run_that_was_about_to_end_for_skipped_steps_can_be_resumed(drawn, tmp_path, monkeypatch, capsys):
    choices = {
        "epochs": 1,
        "batch_size": 2,
        "max_skipped": 3,
        "log_every": 100,
    }  # six steps, of which the last has the only line
    with monkeypatch.context() as patch:
        patch.setattr(train.Objective, "__call__", loss_with([1, *[math.nan] * 4]))
        stop_after(patch, 5)
        assert run(drawn, tmp_path / "r", **choices) == train.STOPPED
    assert read_checkpoint(tmp_path / "r/checkpoints/0+5.pth")["tally"]["skipped"].tolist() == [4, 4, 4, 4]
    assert run(drawn, tmp_path / "r", **choices, resume="auto") == 0
    assert "4 steps in all had no finite loss and gradient" in capsys.readouterr().out


def test_too_many_skipped_steps_in_a_row_end_the_run(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.Objective, "__call__", loss_with([1, 1, 1, 1, *[math.nan] * 50]))
    assert run(drawn, tmp_path / "r", epochs=9, max_skipped=6) == 2
    error = capsys.readouterr().err
    assert "no finite numbers in 6 steps in a row, until step 10 in epoch 4" in error and error.count("\n") == 1
    for path in (tmp_path / "r/checkpoints").iterdir():
        assert all(torch.isfinite(value).all() for value in read_checkpoint(path)["model"].values()), path


def test_weights_that_are_no_numbers_are_never_saved(drawn, tmp_path, monkeypatch, capsys):
    # Finite gradients, at a rate that takes the weights beyond float32.
    monkeypatch.setattr(train, "learning_rate", lambda *_: math.inf)
    assert run(drawn, tmp_path / "r", epochs=1, save_minutes=1e-6) == 2
    assert "weights are no finite numbers after 0 epochs and 1 steps, and were not saved" in capsys.readouterr().err
    assert not list((tmp_path / "r").rglob("*.pth"))


def test_loss_scale_finds_its_value_and_the_run_goes_on(drawn, tmp_path):
    # In float16 a scale of 2^16 makes the first gradients overflow; each skipped step halves it.
    assert run(drawn, tmp_path / "r", epochs=4, amp="fp16", base_lr=0.01) == 0
    checkpoint = read_checkpoint(tmp_path / "r/checkpoints/4.pth")
    skipped = int(checkpoint["tally"]["skipped"][3])
    assert checkpoint["scaler"]["scale"] == 2.0 ** (16 - skipped)
    assert all(torch.isfinite(value).all() for value in checkpoint["model"].values())
    assert json.loads((tmp_path / "r/logs/metrics.jsonl").read_text().splitlines()[-1])["kind"] == "val"


def test_training_goes_on_while_a_checkpoint_is_written(drawn, tmp_path, monkeypatch):
    written, begun = [], []
    save, step = train.save, train.train_step

    def slow(checkpoint, path):
        start = time.monotonic()
        time.sleep(0.5)
        save(checkpoint, path)
        written.append((path.name, start, time.monotonic()))

    monkeypatch.setattr(train, "save", slow)
    monkeypatch.setattr(train, "train_step", lambda *args: (begun.append(time.monotonic()), step(*args)))
    assert run(drawn, tmp_path / "r", epochs=2, val_every=2) == 0
    [(_, start, end)] = [each for each in written if each[0] == "1.pth"]
    assert sum(start < at < end for at in begun) >= 2
    # What was written is the state at the end of the epoch, not what the steps since have made of it.
    monkeypatch.setattr(train, "save", save)
    assert run(drawn, tmp_path / "one", epochs=2, val_every=2) == 0
    assert kills.differences(*(read_checkpoint(tmp_path / name / "checkpoints/1.pth") for name in ("r", "one"))) == []
