"""What may happen to a long training: signals, kills, full disks, lost processes and gradients that are not finite."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import kills
import train
from conftest import free_port, run_ranks
from model import read_checkpoint
from test_train import flags, losses, records, refused, run, train_status

EVERYTHING = {
    "epochs": 3, "val_every": 3, "ema": 0.9, "ohem": 0.7, "class_balance": 0.5, "dropout": 0.3,
    "half_resolution": 0.5, "colour_jitter": (0.3, 0.3, 0.3, 0.05),
}  # fmt: skip


def signalled(function, call, number=signal.SIGTERM):
    """A function that sends this process a signal in its n-th call."""
    count = itertools.count(1)

    def with_signal(*args, **options):
        if next(count) == call:
            os.kill(os.getpid(), number)
        return function(*args, **options)

    return with_signal


def stopped_in(monkeypatch, name, call, *args, **changes):
    """A run that SIGTERM reaches within the n-th call of a function of train.py."""
    with monkeypatch.context() as patch:
        patch.setattr(train, name, signalled(getattr(train, name), call))
        assert run(*args, **changes) == train.STOPPED


# --------------------------------------------------------------------------------------------------------- exact resume


@pytest.mark.parametrize(
    "changes", [{}, {"cache": "ram", "workers": 2, "amp": "fp16", "batch_size": 6, "crop_size": (64, 64)}]
)
def test_stopped_within_an_epoch_and_resumed_equals_uninterrupted(drawn, tmp_path, monkeypatch, capsys, changes):
    tmp_path = tmp_path / "mit Leerzeichen \u00e4\u4e2d"
    choices = {**EVERYTHING, **changes}
    steps = 12 // choices.get("batch_size", 4)
    assert run(drawn, tmp_path / "whole", **choices) == 0
    stopped_in(monkeypatch, "train_step", steps + 1, drawn, tmp_path / "cut", **choices)
    assert "stopped by SIGTERM; everything is saved" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "cut/checkpoints").iterdir()] == ["unfinished_epoch.pth"]
    assert run(drawn, tmp_path / "cut", **choices, resume="auto") == 0
    place = f"unfinished_epoch.pth after epoch 1 and 1 of {steps} steps; changed: nothing"
    assert place in capsys.readouterr().out
    assert kills.compare(tmp_path / "whole", tmp_path / "cut") == []


def test_validation_that_a_signal_prevented_or_interrupted_is_made_up_for(drawn, tmp_path, monkeypatch):
    choices = {"epochs": 4, "batch_size": 12, "val_every": 2}  # epochs of one step
    assert run(drawn, tmp_path / "whole", **choices) == 0
    stopped_in(monkeypatch, "train_step", 2, drawn, tmp_path / "cut", **choices)
    assert (tmp_path / "cut/checkpoints/2.pth").exists() and not records(tmp_path / "cut", "val")
    stopped_in(monkeypatch, "confusion_matrix", 7, drawn, tmp_path / "cut", **choices, resume="auto")
    assert (tmp_path / "cut/checkpoints/4.pth").exists() and len(records(tmp_path / "cut", "val")) == 1
    assert run(drawn, tmp_path / "cut", **choices, resume="auto") == 0
    assert kills.compare(tmp_path / "whole", tmp_path / "cut") == []


def train_with_rank_1_signalled(name, call, argv):
    if os.environ["RANK"] == "1":
        setattr(train, name, signalled(getattr(train, name), call))
    return train_status(argv)


def test_two_processes_of_which_one_is_signalled_stop_together_and_resume_exactly(drawn, tmp_path):
    choices = {"ema": 0.9, "dropout": 0.3, "workers": 1, "val_every": 2}
    assert run_ranks(tmp_path, train_status, flags(drawn, tmp_path / "whole", **choices))[0] == [0, 0]
    argv = flags(drawn, tmp_path / "cut", **choices, resume="auto")
    for name, call, left in (("train_step", 1, "unfinished_epoch.pth"), ("confusion_matrix", 1, "2.pth")):
        statuses, output = run_ranks(tmp_path, train_with_rank_1_signalled, name, call, argv)
        assert statuses == [train.STOPPED] * 2, output
        assert "stopped by another process; everything is saved" in output and "Traceback" not in output
        assert (tmp_path / "cut/checkpoints" / left).exists()
    assert run_ranks(tmp_path, train_status, argv)[0] == [0, 0]
    assert kills.compare(tmp_path / "whole", tmp_path / "cut") == []


def test_other_batch_and_number_of_processes_continue_at_the_same_share_of_the_epoch(drawn, tmp_path, monkeypatch):
    stopped_in(monkeypatch, "train_step", 3, drawn, tmp_path / "r", epochs=1, batch_size=2)
    statuses, output = run_ranks(tmp_path, train_status, flags(drawn, tmp_path / "r", epochs=1, resume="auto"))
    assert statuses == [0, 0], output
    assert "after epoch 0 and 1 of 3 steps; changed: batch_size 2 -> 4" in output and "world_size 1 -> 2" in output
    assert [r["step"] for r in records(tmp_path / "r", "train")] == [1, 2, 3, 2, 3]


def test_other_precision_starts_with_a_loss_scale_of_its_own(drawn, tmp_path):
    options = {"batch_size": 12, "crop_size": (32, 64)}
    assert run(drawn, tmp_path / "r", **options, epochs=1) == 0
    assert run(drawn, tmp_path / "r", **options, epochs=2, amp="fp16", resume="auto") == 0
    assert read_checkpoint(tmp_path / "r/checkpoints/2.pth")["scaler"]["scale"] >= 2.0**15


def test_damaged_checkpoints_are_passed_over_with_a_line(drawn, tmp_path, capsys):
    assert run(drawn, tmp_path / "r", epochs=1, resume="auto") == 0
    assert "nothing to resume in" in capsys.readouterr().out
    assert run(drawn, tmp_path / "r", epochs=3, resume="auto") == 0
    folder = tmp_path / "r/checkpoints"
    whole = read_checkpoint(folder / "3.pth")
    content = bytearray((folder / "3.pth").read_bytes())
    content[len(content) // 2] ^= 1  # one bit, within the numbers
    (folder / "3.pth").write_bytes(content)
    (folder / "2.pth").write_bytes((folder / "2.pth").read_bytes()[:1000])
    (folder / ".checkpoint.tmp").write_bytes(b"of a process that was killed")
    capsys.readouterr()
    assert run(drawn, tmp_path / "r", epochs=3, resume="auto") == 0
    out = capsys.readouterr().out
    assert re.search(r"skipped \S+/3\.pth: .*\nskipped \S+/2\.pth: ", out) and "1.pth after epoch 1" in out
    assert kills.differences(whole, read_checkpoint(folder / "3.pth")) == []
    assert not list(folder.glob(".*"))


def test_what_does_not_continue_a_run_is_refused_and_nothing_is_touched(drawn, folder_dataset, tmp_path, capsys):
    assert run(drawn, tmp_path / "r", epochs=1) == 0
    checkpoint, best = (tmp_path / "r/checkpoints" / name for name in ("1.pth", "best_model.pth"))
    before = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    refused(capsys, f"{checkpoint} already exists: use --resume auto, or another", drawn, tmp_path / "r")
    refused(capsys, f"{checkpoint} already exists", drawn, tmp_path / "r", resume=tmp_path / "other/2.pth")
    other = tmp_path / "other"
    refused(capsys, "best_model.pth: holds only weights", drawn, other, resume=best)
    own = {"dataset": "folder", "crop_size": (32, 48)}
    refused(capsys, "1.pth: holds the network {'num_classes': 19", folder_dataset, other, **own, resume=checkpoint)
    refused(capsys, "1.pth: holds the network", drawn, other, dropout=0.5, resume=checkpoint)
    refused(capsys, "1.pth: was trained with --ema 0.0; use the same", drawn, other, ema=0.9, resume=checkpoint)
    names = {"names": [f"class {i}" for i in range(19)]}
    (folder_dataset / "classes.json").write_text(json.dumps(names))
    for path in folder_dataset.glob("labels/*/*.png"):
        Image.fromarray((np.arange(48 * 64, dtype=np.uint8) % 19).reshape(48, 64)).save(path)
    refused(capsys, "1.pth: was trained on other classes", folder_dataset, other, **own, resume=checkpoint)
    assert before == {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    checkpoint.write_bytes(before[checkpoint][:-100])
    refused(capsys, f"{checkpoint}: ", drawn, tmp_path / "r", resume="auto")


def test_a_checkpoint_of_another_folder_is_continued_in_a_new_one(drawn, tmp_path):
    assert run(drawn, tmp_path / "a") == 0
    assert run(drawn, tmp_path / "b", epochs=3, resume=tmp_path / "a/checkpoints/1.pth") == 0
    assert [r["epoch"] for r in records(tmp_path / "b", "val")] == [1, 2, 3]
    assert records(tmp_path / "b", "val")[0] == records(tmp_path / "a", "val")[0]  # made again


def test_finished_run_that_lost_its_best_model_makes_it_again(drawn, tmp_path):
    assert run(drawn, tmp_path / "r", epochs=1) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "r/checkpoints").iterdir()}
    best = tmp_path / "r/checkpoints/best_model.pth"
    argv = flags(drawn, tmp_path / "r", epochs=1, resume="auto")
    for world_size in (1, 2):
        miou = read_checkpoint(best)["miou"]
        best.unlink()
        statuses, output = run_ranks(tmp_path, train_status, argv, world_size=world_size)
        assert statuses == [0] * world_size, output
        assert read_checkpoint(best)["miou"] == pytest.approx(miou, abs=1e-6) and before.keys() == set(
            best.parent.iterdir()
        )


def test_optimiser_state_that_does_not_fit_is_refused(drawn, tmp_path, capsys):
    assert run(drawn, tmp_path / "r", epochs=1) == 0
    path = tmp_path / "r/checkpoints/1.pth"
    for damage in ("shape", "buffer", "type", "parameter"):
        checkpoint = torch.load(path, weights_only=True)
        states = checkpoint["optimizer"]["state"]
        if damage == "parameter":
            del states[0]
        else:
            states[0] = {"shape": {"momentum_buffer": torch.zeros(3)}, "buffer": {}, "type": {"momentum_buffer": "x"}}[
                damage
            ]
        train.save(checkpoint, tmp_path / "damaged.pth")
        refused(capsys, "damaged.pth: ", drawn, tmp_path / damage, epochs=2, resume=tmp_path / "damaged.pth")


def test_checkpoints_by_the_clock_leave_the_newest(drawn, tmp_path, monkeypatch):
    seen, save_training = [], train.save_training

    def watched(run, *args, **options):
        save_training(run, *args, **options)
        seen.append([path.stem for path in train.saved_checkpoints(tmp_path / "r/checkpoints")])

    monkeypatch.setattr(train, "save_training", watched)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    assert run(drawn, tmp_path / "r", epochs=3, keep=2, val_every=5) == 0
    unfinished = "unfinished_epoch"
    assert seen[:3] == [[unfinished], [unfinished], ["1"]]
    assert seen[3:6] == [["1", unfinished], ["1", unfinished], ["1", "2"]]
    assert seen[6:] == [["2", unfinished], ["2", unfinished], ["2", "3"], ["2", "3"]]


# --------------------------------------------------------------------------------------- signals, kills, lost processes


def wait_for(process, text):
    """Reads the process' output up to a line that contains the text; all of it so far."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


def test_ctrl_c_reaches_everybody_and_saves_and_says_how_to_continue(drawn, tmp_path):
    process = kills.start(kills.command(drawn, tmp_path / "r", "--epochs", "500", "--val-every", "500"))
    wait_for(process, "step 5/")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the loader's workers get it too
    output, _ = process.communicate(timeout=60)
    assert process.returncode == train.STOPPED and "Traceback" not in output
    assert "stopped by SIGINT; everything is saved, --resume auto continues" in output
    newest = read_checkpoint(train.saved_checkpoints(tmp_path / "r/checkpoints")[-1])
    assert 3 * newest["epoch"] + newest["steps"] == records(tmp_path / "r", "train")[-1]["step"] >= 5


def train_with_three_signals(argv):
    """A Ctrl-C of which torchrun passes on another at once, and one more after more than a second."""

    def step(*_):
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        time.sleep(1.2)
        print("it goes on", flush=True)
        os.kill(os.getpid(), signal.SIGINT)

    train.train_step = step
    return train_status(argv)


def test_second_signal_exits_at_once_but_a_terminals_double_does_not(drawn, tmp_path):
    statuses, output = run_ranks(tmp_path, train_with_three_signals, flags(drawn, tmp_path / "r"), world_size=1)
    assert statuses == [128 + signal.SIGINT] and output.endswith("it goes on\n")


def test_torchrun_makes_up_for_a_killed_process_and_passes_on_a_signal(drawn, tmp_path):
    argv = kills.command(drawn, tmp_path / "whole")[2:]
    assert run_ranks(tmp_path, train_status, argv)[0] == [0, 0]
    launcher = "--standalone --nproc_per_node=2 --max-restarts=3"
    process = kills.start(kills.command(drawn, tmp_path / "cut", "--resume", "auto", launcher=launcher))
    wait_for(process, "step 5/")
    rank_1 = next(
        pid for pid in kills.children(process.pid) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
    )
    os.kill(rank_1, signal.SIGKILL)
    wait_for(process, "resumed ")
    wait_for(process, "  step ")
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert "stopped by SIGTERM; everything is saved" in output, output
    argv = kills.command(drawn, tmp_path / "cut", "--resume", "auto")[2:]
    assert run_ranks(tmp_path, train_status, argv)[0] == [0, 0]
    assert kills.compare(tmp_path / "whole", tmp_path / "cut") == []


def test_nodes_of_one_and_of_two_processes_train_together(drawn, tmp_path):
    rendezvous = f"--nnodes=2 --rdzv_backend=c10d --rdzv_id=test --rdzv_endpoint=127.0.0.1:{free_port()}"
    launchers = [f"{rendezvous} --nproc_per_node={count}" for count in (1, 2)]
    more = ("--batch-size", "6", "--epochs", "1", "--cache", "ram", "--workers", "0")
    nodes = [kills.start(kills.command(drawn, tmp_path / "r", *more, launcher=each)) for each in launchers]
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sum("batch 6 = 2 x 3 processes" in output for output in outputs) == 1, "process 0 alone says it"
    assert [r["step"] for r in records(tmp_path / "r", "train")] == [1, 2]


def test_killed_at_random_moments_and_resumed_equals_uninterrupted(drawn, tmp_path):
    result = kills.survive(drawn, tmp_path, kills=2, processes=1, seed=1)
    assert result["differences"] == [] and result["kills"] == 2, result


def test_disk_that_fills_leaves_the_last_good_checkpoint(drawn, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    # Room for the first two checkpoints of 9.4 MiB and the best model, not for a third; then the ballast goes.
    shell = f"""
        mount -t tmpfs -o size=60m tmpfs {disk} && head -c 30M /dev/zero > {disk}/ballast || exit 99
        "$@"; echo status $?; ls -A {disk}/r/checkpoints
        rm {disk}/ballast; "$@" --resume auto && cp -r {disk}/r {tmp_path}/kept
    """
    namespace = ["unshare", "--mount", "--map-root-user", "sh", "-c", shell, "sh"]  # where a small disk can be mounted
    if not shutil.which("unshare"):
        pytest.skip("no program unshare here, to mount a small disk with")
    options = {"epochs": 4, "keep": 9}
    process = kills.start([*namespace, sys.executable, kills.ROOT / "train.py", *flags(drawn, disk / "r", **options)])
    output, _ = process.communicate(timeout=120)
    if process.returncode == 99:
        pytest.skip("this system lets nobody mount a small disk")
    assert run(drawn, tmp_path / "whole", **options) == 0
    before, _, after = output.partition("status 2\n")
    assert re.search(r"\ntrain\.py: .*No space left on device.*\n$", before) and "Traceback" not in output, output
    assert "1.pth\n" in after and ".tmp" not in after and "done: best mIoU" in after, output
    assert kills.compare(tmp_path / "whole", tmp_path / "kept") == []


# ---------------------------------------------------------------------------------------- gradients that are not finite


def loss_with(factors):
    """The loss of the n-th step times the n-th factor."""
    plain, factors = train.segmentation_loss, iter(factors)
    return lambda *args, **options: plain(*args, **options) * next(factors)


def state_of(run):
    """Copies of weights, statistics and momenta, which a skipped step leaves as they are."""
    momenta = [run.optimizer.state[parameter]["momentum_buffer"] for parameter in run.model.parameters()]
    named = {name: value for name, value in run.model.state_dict().items() if not name.endswith("num_batches_tracked")}
    return [value.clone() for value in (*named.values(), *momenta)]


def test_steps_without_finite_gradients_are_as_if_they_had_not_been(drawn, tmp_path, monkeypatch, capsys):
    for amp, bad in (("off", math.nan), ("off", math.inf), ("bf16", math.nan)):
        states, step, out = [], train.train_step, tmp_path / f"{amp} {bad}"

        def watched(run, *batch, states=states, step=step):
            states.append(state_of(run))
            result = step(run, *batch)
            states.append(state_of(run))
            return result

        with monkeypatch.context() as patch:
            patch.setattr(train, "segmentation_loss", loss_with([bad, 1, bad]))
            patch.setattr(train, "train_step", watched)
            assert run(drawn, out, epochs=1, amp=amp, ema=0.5) == 0
        same = [all(map(torch.equal, *states[i : i + 2])) for i in (0, 2, 4)]
        assert same == [True, False, True] and all(value.isfinite().all() for value in states[-1])
        assert not any(value.any() for value in states[1][-100:])  # momenta, which PyTorch would leave undefined
        assert [(loss is None, r["skipped"]) for loss, r in zip(losses(out), records(out, "train"))] == [
            (True, 1), (False, 0), (True, 1),
        ]  # fmt: skip
        assert all(value.isfinite().all() for value in read_checkpoint(out / "checkpoints/1.pth")["model"].values())
        assert capsys.readouterr().out.count("skipped 1 steps") == 2


def train_with_bad_steps_in_rank_1(argv):
    if os.environ["RANK"] == "1":
        train.segmentation_loss = loss_with([1, math.nan, math.nan, 1, 1, 1])
    return train_status(argv)


def test_two_processes_skip_together(drawn, tmp_path):
    argv = flags(drawn, tmp_path / "r", val_every=2)
    assert run_ranks(tmp_path, train_with_bad_steps_in_rank_1, argv)[0] == [0, 0]
    assert [r["skipped"] for r in records(tmp_path / "r", "train")] == [0, 1, 1, 0, 0, 0]
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "r")[3:])


def test_too_many_skipped_steps_in_a_row_end_the_run(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "segmentation_loss", loss_with([math.nan, *[1] * 3, *[math.nan] * 50]))
    monkeypatch.setattr(train, "MAX_SKIPPED", 5)
    message = "no finite gradients in 5 steps in a row, up to step 9 in epoch 3"  # an epoch has 3
    refused(capsys, message, drawn, tmp_path / "r", epochs=9)
    assert read_checkpoint(tmp_path / "r/checkpoints/2.pth")  # which is finite


def test_skipped_steps_are_counted_across_lines_of_the_log(drawn, tmp_path, monkeypatch, capsys):
    """Lines come after steps 6 and 10: four before a good step do not end the run, one and four after it do."""
    monkeypatch.setattr(train, "segmentation_loss", loss_with([*[math.nan] * 4, 1, *[math.nan] * 50]))
    monkeypatch.setattr(train, "MAX_SKIPPED", 5)
    message = "no finite gradients in 5 steps in a row, up to step 10 in epoch 2"
    refused(capsys, message, drawn, tmp_path / "r", batch_size=2, log_every=10)
