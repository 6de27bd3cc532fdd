"""Training: schedule and loss by hand, one process against two, resuming, real data, and what it refuses."""

import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import train
from conftest import last_json, run_script
from data import IGNORE
from eval import UsageError, exit_status
from model import FastSCNN, load_weights, read_checkpoint
from train import Objective, choose_amp, learning_rate, parameter_groups


def flags(root, out, **changes):
    """A short run on drawn scenes, in float32."""
    options = {
        "data": root, "out": out, "device": "cpu", "epochs": 2, "batch_size": 4, "crop_size": (64, 96), "amp": "off",
        "workers": 0, "val_every": 1, "log_every": 1, **changes,
    }  # fmt: skip
    argv = []
    for name, value in options.items():
        if value is not None:
            values = () if value is True else value if isinstance(value, tuple) else (value,)
            argv += [f"--{name.replace('_', '-')}", *map(str, values)]
    return argv


def run(*args, **changes):
    """train.py in this process; its exit status."""
    return exit_status("train.py", lambda: train.main(flags(*args, **changes)))


def records(out, kind):
    lines = (out / "logs" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


# ------------------------------------------------------------------------------------------------------- parts of the loop


def test_recipes_set_defaults_and_flags_beside_them_win():
    plain = vars(train.parse_args([]))
    for recipe, by_dataset in train.RECIPES.items():
        for dataset, choices in by_dataset.items():
            assert choices.keys() <= plain.keys(), "a recipe sets what is no flag"
            args = train.parse_args(["--recipe", recipe, "--dataset", dataset])
            assert {name: getattr(args, name) for name in choices} == choices
            train.check_args(args, 1)
    paper = train.parse_args(["--recipe", "paper", "--batch-size", "6"])
    assert (paper.batch_size, paper.base_lr, paper.epochs, paper.aux_weight) == (6, 0.045, 1000, 0.4)
    assert (paper.momentum, paper.weight_decay, paper.schedule, paper.ohem, paper.ema) == (0.9, 4e-5, "poly", 0, 0)
    with pytest.raises(UsageError, match="--recipe paper is for cityscapes, camvid, folder, not for kitti"):
        train.parse_args(["--recipe", "paper", "--dataset", "kitti"])


def test_poly_schedule_by_hand():
    assert learning_rate(0, 100, 0.1, 0) == pytest.approx(0.1)
    assert learning_rate(50, 100, 0.1, 0) == pytest.approx(0.1 * 0.5**0.9)
    assert learning_rate(99, 100, 0.1, 0) == pytest.approx(0.1 * 0.01**0.9)
    assert learning_rate(1, 100, 0.1, 3) == pytest.approx(0.1 * 2 / 4 * 0.99**0.9)
    # The warm-up takes at most a tenth of a run: of 20 steps 2, however long it was asked to be.
    assert learning_rate(2, 20, 0.1, 200) == pytest.approx(0.1 * 0.9**0.9)


def test_cosine_schedule_by_hand():
    rates = [learning_rate(step, 100, 0.1, 0, "cosine") for step in (0, 25, 50, 100)]
    assert rates == pytest.approx([0.1, 0.1 * (0.5 + 0.25 * 2**0.5), 0.05, 0])


def test_time_left_counts_steps_at_half_the_resolution_as_a_quarter(monkeypatch):
    clock = iter([0.0, 10.0, 40.0])
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    progress = train.Progress(0, 100, 4, half_steps=80)  # 20 steps' worth, and 20 more
    assert progress.report(40) == pytest.approx((16.0, 30.0))  # 10 of 40 done in 10 s
    assert progress.report(100) == pytest.approx((8.0, 0.0))


def test_weight_decay_spares_depthwise_kernels_norms_and_biases():
    model = FastSCNN(19, aux=True)
    decayed, others = parameter_groups(model, 4e-5)
    assert decayed["weight_decay"] == 4e-5 and others["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    spared = {names[id(p)] for p in others["params"]}
    assert len(decayed["params"]) + len(spared) == len(names)
    for name, p in model.named_parameters():
        depthwise = p.ndim == 4 and p.shape[1] == 1
        assert (name in spared) == (p.ndim == 1 or depthwise), name
    assert sum(p.ndim == 4 for p in others["params"]) == 2 + 9 + 1 + 2  # depthwise kernels of the four stages


def test_loss_weights_the_auxiliary_outputs_by_0_4():
    target = torch.zeros(1, 8, 8, dtype=torch.uint8)
    target[0, 0, 0] = IGNORE
    flat = torch.zeros(1, 2, 4, 4)  # two equal scores: ln 2 for each of the 63 pixels that count
    expected = torch.log(torch.tensor(2.0))
    torch.testing.assert_close(Objective()(flat, target), expected)
    torch.testing.assert_close(Objective()((flat, flat, flat[..., :1, :1]), target), 1.8 * expected)
    torch.testing.assert_close(Objective(aux_weight=0.1)((flat, flat, flat[..., :1, :1]), target), 1.2 * expected)


def plain_loss(main, aux, target, weights, smoothing, probability):
    """The same loss, restated at full resolution in float64."""

    def losses(scores, weights=weights, smoothing=smoothing):
        scores = F.interpolate(scores, target.shape[1:], mode="bilinear")
        return F.cross_entropy(scores, target.long(), weights, ignore_index=IGNORE, label_smoothing=smoothing, reduction="none")

    labelled = target != IGNORE
    weight = weights[target.where(labelled, 0).long()] * labelled
    main, aux, bare, kept = losses(main), losses(aux), losses(main.detach(), None, 0.0), labelled
    if probability:  # by the true class's probability, whatever its weight
        sample = bare[:, ::4, ::4]
        hardest = sample[labelled[:, ::4, ::4]].sort(descending=True).values[sample.numel() // 16 - 1]
        kept = labelled & (bare >= min(-math.log(probability), hardest))
    return (main * kept).sum() / (weight * kept).sum() + 0.4 * aux.sum() / weight.sum(), kept


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("probability", [0, 0.7, 0.999, 0.3, 1e-4])
def test_loss_and_gradient_of_hard_pixels_and_weighted_classes(probability, balanced):
    torch.manual_seed(0)
    main, aux = (2 * torch.randn(2, 5, 12, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    target = torch.randint(0, 5, (2, 96, 128)).to(torch.uint8)
    target[:, :30, :50] = IGNORE
    weights = torch.tensor([0.2, 1.0, 3.0, 0.5, 1.5]).double() if balanced else torch.ones(5).double()
    objective = Objective(label_smoothing=0.1, ohem=probability, class_weights=weights if balanced else None)
    expected, kept = plain_loss(main, aux, target, weights, 0.1, probability)
    if probability == 1e-4:  # next to none is that hard: it is the sixteenth
        assert 0.03 < kept.float().mean() < 0.1
    loss = objective((main, aux), target)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for got, want in zip(torch.autograd.grad(loss, (main, aux)), torch.autograd.grad(expected, (main, aux))):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("choices", [{}, {"ohem": 0.7}, {"class_weights": torch.ones(3)}])
def test_loss_of_unlabelled_images_is_0(choices):
    scores = torch.randn(1, 3, 8, 8, requires_grad=True)
    loss = Objective(**choices)(scores, torch.full((1, 64, 64), IGNORE, dtype=torch.uint8), teacher=torch.randn(1, 3, 8, 8))
    loss.backward()
    assert loss == 0 and not scores.grad.any()


def test_the_teachers_part_of_the_loss_by_hand():
    # Student (1/2, 1/2), teacher (3/4, 1/4): sum of q ln(q / p), at the three of four places that are labelled.
    target = torch.zeros(1, 8, 8, dtype=torch.uint8)
    target[:, :4, :4] = IGNORE
    student, teacher = torch.zeros(1, 2, 2, 2), torch.tensor([3.0, 1.0]).log().view(1, 2, 1, 1).repeat(1, 1, 2, 2)
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    loss = Objective(teacher_weight=2.0)(student, target, teacher) - Objective()(student, target)
    assert loss.item() == pytest.approx(2 * divergence, rel=1e-5)
    assert Objective(teacher_weight=2.0)(teacher, target, teacher) == Objective()(teacher, target)


def test_class_weights_by_hand(folder_dataset):
    dataset = data.open_dataset("folder", folder_dataset, "train")
    labels = torch.cat([dataset[i][1].flatten() for i in range(len(dataset))])
    share = torch.bincount(labels[labels != IGNORE].long(), minlength=len(dataset.classes.names)).double()
    share /= share.sum()
    expected = torch.where(share > 0, share**-0.5, 0)
    expected /= (expected * share).sum()
    shares = train.class_shares(dataset)
    torch.testing.assert_close(shares, share, rtol=1e-9, atol=0)
    torch.testing.assert_close(train.class_weights(shares, 0.5).double(), expected, rtol=1e-5, atol=0)
    assert (train.class_weights(shares, 0)[share > 0] == 1).all()


def test_the_weights_of_classes_move_evenly_to_their_last_power():
    def powers(*flags):
        args = train.parse_args(["--epochs", "5", *flags])
        return [train.class_power(epoch, args) for epoch in range(1, 6)]

    assert powers("--class-balance", "0.5", "--class-balance-end", "0") == pytest.approx([0.5, 0.375, 0.25, 0.125, 0])
    assert powers("--class-balance", "0.5") == [0.5] * 5 and powers() == [0] * 5


def test_moving_average_by_hand():
    layer = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1))
    average = train.MovingAverage(layer, 0.5)
    expected, seen = layer[0].weight.item(), []
    for step, decay in ((1, 0.1), (2, 2 / 11), (3, 0.25), (20, 0.5)):
        average.steps = step - 1
        layer[0].weight.data.fill_(step)
        layer[1].running_mean.fill_(-step)
        average.update()
        expected = decay * expected + (1 - decay) * step
        seen.append(average.model[0].weight.item() - expected)
    assert seen == pytest.approx([0] * 4, abs=1e-6)
    assert average.model[1].running_mean.item() == pytest.approx(-expected, abs=0.2) and layer[0].weight.item() == 20


def test_mixed_precision_is_chosen_by_the_hardware(monkeypatch):
    cpu = torch.device("cpu")
    assert choose_amp("fp16", cpu) == "fp16" and choose_amp("off", cpu) == "off"
    for capabilities, expected in (({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "off")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c)
        assert choose_amp("auto", cpu) == expected


# ---------------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_learns_and_writes_what_it_says(drawn, tmp_path, capsys):
    out = tmp_path / "runs"
    assert run(drawn, out, epochs=5, keep=2, workers=1, base_lr=0.15) == 0
    losses = [record["loss"] for record in records(out, "train")]
    assert len(losses) == 15 and sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["4.pth", "5.pth", "best_model.pth"]
    validated = records(out, "val")
    assert [r["epoch"] for r in validated] == [1, 2, 3, 4, 5]
    best = torch.load(out / "checkpoints/best_model.pth", weights_only=True)
    assert best["miou"] == max(r["miou"] for r in validated)
    assert best["classes"]["names"][0] == "road" and len(best["classes"]["colours"]) == 19
    assert load_weights(out / "checkpoints/best_model.pth", num_classes=19).args["num_classes"] == 19
    log = (out / "logs/train.log").read_text()
    assert "learning rate 0.15 x 4 / 12 = 0.05000" in log and "processes 1" in log and "upsample_argmax=" in log
    assert log.strip() in capsys.readouterr().out
    result = run_script("eval.py", "--weights", out / "checkpoints/5.pth", "--data", drawn, "--device", "cpu")
    assert last_json(result.stdout)["miou"] == pytest.approx(validated[-1]["miou"], abs=1e-3)


def test_two_processes_take_the_steps_of_one(drawn, tmp_path):
    # Batch normalisation is frozen, since PyTorch cannot synchronise it on the CPU.
    common = {"augment": None, "dropout": 0, "freeze_bn": True, "epochs": 2}
    argv = [f for f in flags(drawn, tmp_path / "one", **common)] + ["--no-augment"]
    one = run_script("train.py", *argv)
    argv = [f for f in flags(drawn, tmp_path / "two", **common)] + ["--no-augment"]
    two = run_script("train.py", *argv, processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    losses = [[r["loss"] for r in records(tmp_path / name, "train")] for name in ("one", "two")]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert records(tmp_path / "two", "val")[-1]["miou"] == pytest.approx(records(tmp_path / "one", "val")[-1]["miou"], abs=2e-3)
    assert "no SyncBatchNorm on the CPU: each process normalises over its own 2 images" in two.stdout
    assert "batch 4 = 2 x 2" in two.stdout


@pytest.mark.parametrize("workers", [0, 1])
def test_interrupted_and_resumed_equals_uninterrupted(drawn, tmp_path, capsys, workers):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run(drawn, whole, epochs=4, keep=9, workers=workers) == 0
    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "checkpoints/2.pth", resumed / "checkpoints")  # all that is left of a run stopped after epoch 2
    assert run(drawn, resumed, epochs=4, keep=9, resume="auto", workers=workers) == 0
    output = capsys.readouterr().out
    assert "2.pth after epoch 2; changed: out" in output and "there is no best_model.pth to go with it" in output
    a, b = (read_checkpoint(out / "checkpoints/4.pth") for out in (whole, resumed))
    assert a["epoch"] == b["epoch"] == 4
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name
    momenta = [[state["momentum_buffer"] for state in c["optimizer"]["state"].values()] for c in (a, b)]
    assert len(momenta[0]) > 100 and all(torch.equal(x, y) for x, y in zip(*momenta))
    assert [(r["step"], r["loss"], r["lr"]) for r in records(whole, "train")[6:]] == [
        (r["step"], r["loss"], r["lr"]) for r in records(resumed, "train")
    ]
    assert records(whole, "val")[2:] == records(resumed, "val")
    assert load_weights(resumed / "checkpoints/best_model.pth")


EVERYTHING = {
    "ema": 0.9, "ohem": 0.7, "class_balance": 0.5, "class_balance_end": 0.1, "label_smoothing": 0.1, "optimizer": "adamw", "base_lr": 0.003,
    "schedule": "cosine", "contrast": 0.3, "saturation": 0.3, "hue": 10, "max_class_share": 0.5, "half_resolution": 0.5,
}  # fmt: skip


def test_interrupted_and_resumed_with_every_part_of_the_recipe(drawn, tmp_path):
    assert run(drawn, tmp_path / "teacher", epochs=1) == 0
    choices = {**EVERYTHING, "teacher": tmp_path / "teacher/checkpoints/1.pth", "epochs": 4}
    assert run(drawn, tmp_path / "whole", **choices) == 0
    (tmp_path / "cut/checkpoints").mkdir(parents=True)  # interrupted in its third epoch
    shutil.copy(tmp_path / "whole/checkpoints/2.pth", tmp_path / "cut/checkpoints/2.pth")
    assert run(drawn, tmp_path / "cut", **choices, resume="auto") == 0
    whole, cut = (read_checkpoint(tmp_path / name / "checkpoints/4.pth") for name in ("whole", "cut"))
    for part in ("model", "trained"):
        assert all(torch.equal(value, cut[part][name]) for name, value in whole[part].items())
    assert any(not torch.equal(value, whole["model"][name]) for name, value in whole["trained"].items())
    # What was validated is the average, and it is what the checkpoint gives to everybody else.
    best = read_checkpoint(tmp_path / "whole/checkpoints/best_model.pth")
    assert "trained" not in best and best["miou"] == max(r["miou"] for r in records(tmp_path / "whole", "val"))


def test_two_processes_take_the_steps_of_one_with_every_part_of_the_recipe(drawn, tmp_path):
    root = unevenly_labelled(drawn, tmp_path / "uneven")
    assert run(drawn, tmp_path / "teacher", epochs=1) == 0
    choices = {**EVERYTHING, "optimizer": "sgd", "base_lr": 0.045, "teacher": tmp_path / "teacher/checkpoints/1.pth"}
    choices |= {"dropout": 0, "freeze_bn": True, "epochs": 1, "half_resolution": 0}
    for name, processes in (("one", 1), ("two", 2)):
        done = run_script("train.py", *flags(root, tmp_path / name, **choices), processes=processes)
        assert done.returncode == 0, done.stderr
    losses = [[r["loss"] for r in records(tmp_path / name, "train")] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for part in ("trained", "model"):
        one, two = (read_checkpoint(tmp_path / name / "checkpoints/1.pth")[part] for name in ("one", "two"))
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)


def test_resuming_with_another_optimiser_or_without_the_average_is_refused(drawn, tmp_path, capsys):
    assert run(drawn, tmp_path / "r", epochs=1, ema=0.9) == 0
    for changes, message in (
        ({"ema": 0.9, "optimizer": "adamw"}, "1.pth: holds the state of sgd; give --optimizer sgd"),
        ({}, "1.pth: holds a moving average beside the weights; give --ema"),
    ):
        assert run(drawn, tmp_path / "r", **changes, resume="auto") == 2
        assert message in capsys.readouterr().err
    assert run(drawn, tmp_path / "r", ema=0.5, ohem=0.7, resume="auto") == 0
    assert "changed: epochs 1 -> 2, ohem 0.0 -> 0.7, ema 0.9 -> 0.5" in capsys.readouterr().out


def test_teacher_of_other_classes_is_refused(drawn, folder_dataset, tmp_path, capsys):
    assert run(folder_dataset, tmp_path / "t", dataset="folder", epochs=1, crop_size=(32, 48)) == 0
    capsys.readouterr()
    assert run(drawn, tmp_path / "r", teacher=tmp_path / "t/checkpoints/1.pth") == 2
    assert "was trained on other classes than this run" in capsys.readouterr().err


def test_resuming_elsewhere_takes_the_best_model_along(drawn, tmp_path):
    assert run(drawn, tmp_path / "a", epochs=2) == 0
    assert run(drawn, tmp_path / "b", epochs=1, seed=5) == 0  # another run, where the resumed one will be written
    other = (tmp_path / "b/checkpoints/1.pth").read_bytes()
    assert run(drawn, tmp_path / "b", epochs=2, resume=tmp_path / "a/checkpoints/2.pth") == 0
    same = (tmp_path / "b/checkpoints/best_model.pth", tmp_path / "a/checkpoints/best_model.pth")
    assert same[0].read_bytes() == same[1].read_bytes()
    assert [p.read_bytes() for p in (tmp_path / "b/earlier").rglob("1.pth")] == [other]


def test_going_back_in_a_run_moves_later_checkpoints_aside(drawn, tmp_path):
    assert run(drawn, tmp_path / "r", epochs=3, keep=9) == 0
    best_before = read_checkpoint(tmp_path / "r/checkpoints/best_model.pth")["epoch"]
    assert run(drawn, tmp_path / "r", epochs=3, keep=9, resume=tmp_path / "r/checkpoints/1.pth", weight_decay=0.1) == 0
    moved = sorted(p.name for p in (tmp_path / "r/earlier").rglob("*.pth"))
    assert moved[:2] == ["2.pth", "3.pth"] and moved[2:] == (["best_model.pth"] if best_before > 1 else [])
    assert (
        read_checkpoint(tmp_path / "r/checkpoints/best_model.pth")["miou"]
        == read_checkpoint(tmp_path / "r/checkpoints/3.pth")["best_miou"]
    )
    assert [r["epoch"] for r in records(tmp_path / "r", "val")] == [1, 2, 3]  # no epoch twice
    decays = [g["weight_decay"] for g in read_checkpoint(tmp_path / "r/checkpoints/3.pth")["optimizer"]["param_groups"]]
    assert decays == [0.1, 0]  # the flag counts, not the checkpoint


def test_resuming_in_another_precision(drawn, tmp_path):
    assert run(drawn, tmp_path / "r", epochs=1) == 0
    assert run(drawn, tmp_path / "r", epochs=2, resume="auto", amp="fp16", loss_scale=128) == 0
    assert run(drawn, tmp_path / "r", epochs=3, resume="auto", amp="bf16") == 0


def test_finished_run_resumes_to_nothing(drawn, tmp_path):
    assert run(drawn, tmp_path / "r", epochs=1) == 0
    before = (tmp_path / "r/checkpoints/1.pth").read_bytes()
    (tmp_path / "same").symlink_to(drawn)  # the same data by another path
    assert run(tmp_path / "same", tmp_path / "r", epochs=1, resume="auto") == 0
    assert (tmp_path / "r/checkpoints/1.pth").read_bytes() == before


def test_new_run_moves_an_earlier_one_aside(drawn, tmp_path):
    assert run(drawn, tmp_path / "r", epochs=1) == 0
    before = (tmp_path / "r/checkpoints/1.pth").read_bytes()
    assert run(drawn, tmp_path / "r", epochs=1, seed=1) == 0
    (earlier,) = (tmp_path / "r/earlier").iterdir()
    assert (earlier / "checkpoints/1.pth").read_bytes() == before and (earlier / "logs/metrics.jsonl").exists()
    assert len(records(tmp_path / "r", "val")) == 1


def test_half_precision_with_a_static_loss_scale(drawn, tmp_path):
    assert run(drawn, tmp_path / "r", epochs=1, amp="fp16", loss_scale=128) == 0
    checkpoint = read_checkpoint(tmp_path / "r/checkpoints/1.pth")
    assert checkpoint["scaler"]["scale"] == 128
    losses = [r["loss"] for r in records(tmp_path / "r", "train")]
    assert run(drawn, tmp_path / "s", epochs=1) == 0
    assert losses == pytest.approx([r["loss"] for r in records(tmp_path / "s", "train")], rel=0.02)


def unevenly_labelled(drawn, root):
    """The drawn scenes with most labels of every second image ignored."""
    shutil.copytree(drawn, root)
    for path in sorted((root / "gtFine/train/street").glob("*_labelIds.png"))[::2]:
        label = Image.open(path)
        label.paste(0, (0, 0, label.width, label.height - 8))
        label.save(path)
    return root


def test_gradient_of_the_global_mean_whatever_the_ignored_share(drawn, tmp_path):
    # One process has most of its labels ignored: a mean of means would weight its few pixels far too much.
    root = unevenly_labelled(drawn, tmp_path / "uneven")
    common = {"dropout": 0, "freeze_bn": True, "epochs": 1}
    for name, processes in (("one", 1), ("two", 2)):
        done = run_script("train.py", *flags(root, tmp_path / name, **common), processes=processes)
        assert done.returncode == 0, done.stderr
    one, two = (read_checkpoint(tmp_path / name / "checkpoints/1.pth")["model"] for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)


def test_own_folder_trains(folder_dataset, tmp_path):
    assert run(folder_dataset, tmp_path / "r", dataset="folder", epochs=1, crop_size=(32, 48)) == 0
    assert records(tmp_path / "r", "val")[0]["class_iou"].keys() == {"left", "middle", "right"}


def test_real_cityscapes_trains_and_evaluates_at_full_size(cityscapes_sample, tmp_path):
    assert (
        run(cityscapes_sample, tmp_path / "r", epochs=2, batch_size=2, crop_size=(256, 512), val_every=2, workers=1, amp="auto")
        == 0
    )
    losses = [r["loss"] for r in records(tmp_path / "r", "train")]
    assert len(losses) == 4 and all(0 < loss < 10 for loss in losses)
    (result,) = records(tmp_path / "r", "val")
    assert 0 < result["pixel_accuracy"] < 1 and result["class_iou"]["train"] is None


def test_camvid_trains(camvid, tmp_path):
    root = tmp_path / "few"  # eight images of it, to be quick
    for split in ("train", "val"):
        for kind in (split, f"{split}annot"):
            (root / kind).mkdir(parents=True)
            for path in sorted((camvid / kind).iterdir())[:8]:
                shutil.copy(path, root / kind)
    assert run(root, tmp_path / "r", dataset="camvid", epochs=1, crop_size=(180, 240)) == 0
    assert records(tmp_path / "r", "val")[0]["class_iou"].keys() == set(data.CAMVID.names)


# --------------------------------------------------------------------------------------------------------------- caches


def test_training_out_of_a_cache_is_training(drawn, tmp_path):
    for name in ("none", "ram", "device"):
        assert run(drawn, tmp_path / name, cache=name, workers=0 if name == "device" else 1) == 0
    none, ram, device = ([r["loss"] for r in records(tmp_path / name, "train")] for name in ("none", "ram", "device"))
    assert ram == none
    assert device != none and device == pytest.approx(none, rel=0.02)  # pixels rounded otherwise
    assert records(tmp_path / "ram", "val") == records(tmp_path / "none", "val")


@pytest.mark.parametrize("cache", ["ram", "device"])
def test_interrupted_and_resumed_out_of_a_cache(drawn, tmp_path, cache):
    assert run(drawn, tmp_path / "a", cache=cache, epochs=2) == 0
    assert run(drawn, tmp_path / "b", cache=cache, epochs=2) == 0
    (tmp_path / "b" / "checkpoints" / "2.pth").unlink()
    assert run(drawn, tmp_path / "b", cache=cache, epochs=2, resume="auto") == 0
    a, b = (read_checkpoint(tmp_path / name / "checkpoints" / "2.pth")["model"] for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("cache", ["ram", "device"])
def test_two_processes_out_of_a_cache_take_the_steps_of_one(drawn, tmp_path, cache):
    common = {"dropout": 0, "freeze_bn": True, "epochs": 1, "cache": cache}
    one = run_script("train.py", *flags(drawn, tmp_path / "one", **common))
    two = run_script("train.py", *flags(drawn, tmp_path / "two", **common, workers=1), processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    losses = [[r["loss"] for r in records(tmp_path / name, "train")] for name in ("one", "two")]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert f"cache {cache}: " in two.stdout and two.stdout.count(f"cache {cache}: ") == 1


def test_cache_that_fits_no_device_is_shared_out(drawn, tmp_path):
    script = tmp_path / "small.py"  # devices with room for 8 of the 12 images
    script.write_text(
        f"import sys; sys.path[:0] = [{str(Path(train.__file__).parent)!r}]; import train\n"
        "train.device_room = lambda device: 8 * 4 * 96 * 192\n"
        "sys.exit(train.exit_status('train.py', train.main))\n"
    )
    done = run_script(script, *flags(drawn, tmp_path / "r", epochs=1, cache="device"), processes=2)
    assert done.returncode == 0, done.stderr
    assert "12 images, 864.0 KiB, shared out to 2 processes, each with batches of its own part" in done.stdout


def test_cache_that_fits_nowhere_is_one_line_before_anything_is_written(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "device_room", lambda device: 2**19)
    assert run(drawn, tmp_path / "r", cache="device") == 2
    assert "--cache device needs 864.0 KiB, and 1 x 512.0 KiB of the devices are free" in capsys.readouterr().err
    monkeypatch.setattr(data, "free_memory", lambda: 2**19)
    assert run(drawn, tmp_path / "r", cache="ram") == 2
    assert "12 images takes 864.0 KiB of memory, of which 512.0 KiB are free" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_little_shared_memory_is_said_before_workers_meet_it(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**17))
    assert run(drawn, tmp_path / "r", workers=2) == 2
    assert "2 workers need up to 576.0 KiB of /dev/shm, which has 128.0 KiB" in capsys.readouterr().err


def test_worker_that_dies_is_one_line(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data.Crop, "of", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert run(drawn, tmp_path / "r", workers=1) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("train.py: a decoding process was killed") and "--workers" in line


@pytest.mark.parametrize("cache", ["none", "device"])
def test_benchmark_measures_and_writes_nothing(drawn, tmp_path, capsys, cache):
    assert run(drawn, tmp_path / "r", benchmark=3, cache=cache) == 0
    result = last_json(capsys.readouterr().out)
    assert min(result[f"{what}images_per_s"] for what in ("", "loader_", "step_")) > 0
    assert set(result["step_ms"]) == {"copy to the device", "forward", "loss", "backward", "optimiser"}
    assert result["steps"] == 3 and result["peak_memory_mib"] > 0
    assert not (tmp_path / "r").exists()


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 0}, "--batch-size is 0, expected at least 1"),
        ({"batch_size": 1}, "one image per process leaves batch normalisation"),
        ({"epochs": 0}, "--epochs is 0, expected at least 1"),
        ({"benchmark": 0}, "--benchmark is 0, expected at least 1"),
        ({"crop_size": (16, 64)}, "--crop-size is 16 64, expected 32 to 16384 pixels each"),
        ({"scale_range": (2.0, 0.5)}, "--scale-range is 2.0 0.5"),
        ({"loss_scale": "large"}, "--loss-scale is large, expected dynamic or a positive number"),
        ({"split": "trian"}, "no images"),
        ({"dataset": "voc"}, "dataset 'voc' is unknown"),
        ({"resume": "/none/3.pth"}, "/none/3.pth: no such checkpoint"),
        (
            {"base_lr": 1e30, "warmup_steps": 0, "max_skipped": 2},
            "loss or gradients were no finite numbers in 2 steps in a row",
        ),
        ({"base_lr": math.nan}, "--base-lr is nan, expected at most"),
        ({"scale_range": (1, math.inf)}, "--scale-range is 1.0 inf"),
        ({"peer_timeout": 0}, "--peer-timeout is 0.0, expected at least 0.1"),
        ({"seed": 2**64}, "--seed is 18446744073709551616, expected at most 9223372036854775807"),
        ({"amp": "int8"}, "invalid choice: 'int8'"),
        ({"workers": -1}, "--workers is -1, expected at least 0"),
        ({"base_lr": -1}, "--base-lr is -1.0, expected at least 0"),
        ({"dropout": 1}, "--dropout is 1.0, expected less than 1"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_2(drawn, tmp_path, capsys, changes, message):
    assert run(drawn, tmp_path / "r", **changes) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("train.py: ") and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.pth")) and not list(tmp_path.rglob("*.tmp"))


def test_too_little_memory_is_one_line(drawn, tmp_path, monkeypatch, capsys):
    def allocate(*_):
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(train, "train_step", allocate)
    assert run(drawn, tmp_path / "r") == 2
    assert capsys.readouterr().err.startswith("train.py: 4 crops of 64x96 do not fit in memory; lower --batch-size")


def test_batch_that_does_not_divide_over_the_processes(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert run(drawn, tmp_path / "r", batch_size=12) == 2
    assert "--batch-size 12 does not divide over 8 processes; give e.g. 8" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_processes_say_what_is_wrong_once(drawn, tmp_path):
    done = run_script("train.py", *flags(drawn, tmp_path / "r", batch_size=3), processes=2)
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py")]
    assert done.returncode != 0 and said == ["train.py: --batch-size 3 does not divide over 2 processes; give e.g. 2"]
    assert not (tmp_path / "r").exists()


def broken_data(root, what):
    """Spoils one file of an own dataset of 48x64 images; the name of the file that an error must mention."""
    label, image = root / "labels/train/1.png", root / "images/train/1.png"
    if what == "stray value":
        Image.new("L", (64, 48), 77).save(label)
    elif what == "size":
        Image.new("L", (64, 47)).save(label)
    elif what == "truncated":
        image.write_bytes(image.read_bytes()[:60])
        return image
    elif what == "no label":
        label.unlink()
        return image
    elif what == "no image":
        image.unlink()
    return label


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("what", ["stray value", "size", "truncated", "no label", "no image"])
def test_bad_data_is_one_line_and_leaves_no_checkpoint(folder_dataset, tmp_path, capsys, what, workers):
    name = broken_data(folder_dataset, what)
    assert run(folder_dataset, tmp_path / "r", dataset="folder", crop_size=(32, 48), workers=workers) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train.py: {name}: ") and error.count("\n") == 1
    assert not list((tmp_path / "r").rglob("*.pth"))


def test_bad_validation_image_costs_neither_the_epoch_nor_its_validation(folder_dataset, tmp_path, capsys):
    whole = {}
    for kind in ("images", "labels"):
        path = folder_dataset / kind / "val/0.png"
        whole[path] = path.read_bytes()
        Image.open(path).crop((0, 0, 64, 20)).save(path)
    options = {"dataset": "folder", "epochs": 1, "crop_size": (32, 48)}
    assert run(folder_dataset, tmp_path / "r", **options) == 2
    assert "images/val/0.png: 64x20 pixels, expected at least 32x32" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "r/checkpoints").iterdir()] == ["1.pth"]
    for path, content in whole.items():
        path.write_bytes(content)
    assert run(folder_dataset, tmp_path / "r", **options, resume="auto") == 0
    assert load_weights(tmp_path / "r/checkpoints/best_model.pth")
    assert [r["epoch"] for r in records(tmp_path / "r", "val")] == [1]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_defaults_divide_over_the_usual_numbers_of_processes(world_size):
    train.check_args(train.get_args_parser().parse_args([]), world_size)


def test_resume_refuses_what_does_not_continue_this_run(drawn, folder_dataset, tmp_path, capsys):
    assert run(drawn, tmp_path / "r", epochs=1) == 0
    checkpoint = tmp_path / "r/checkpoints/1.pth"
    before = {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}

    def refused(message, root=drawn, **changes):
        capsys.readouterr()
        assert run(root, tmp_path / "r", **changes) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error

    refused("num_classes 19 (here 3)", root=folder_dataset, dataset="folder", resume=checkpoint)
    refused("dropout 0.1 (here 0.5)", dropout=0.5, resume=checkpoint)
    refused("so no training state; take a numbered one", resume=tmp_path / "r/checkpoints/best_model.pth")
    other = tmp_path / "other"
    shutil.copytree(drawn, other)
    refused("was trained on", root=other, resume="auto")
    checkpoint.write_bytes(before[checkpoint][:-100])
    refused("none of 1 checkpoints can be resumed; passed over ", resume="auto")
    refused("1.pth: damaged, truncated or no checkpoint", resume=checkpoint)
    before.pop(checkpoint)
    assert all(p.read_bytes() == content for p, content in before.items())


def test_resuming_passes_over_damaged_checkpoints_and_says_so(drawn, tmp_path, capsys):
    assert run(drawn, tmp_path / "r", epochs=3) == 0
    folder = tmp_path / "r/checkpoints"
    whole = read_checkpoint(folder / "3.pth")["model"]
    content = bytearray((folder / "3.pth").read_bytes())
    content[len(content) // 2] ^= 1  # one bit, within the numbers
    (folder / "3.pth").write_bytes(content)
    (folder / "2.pth").write_bytes((folder / "2.pth").read_bytes()[:1000])
    (folder / ".2.pth.tmp").write_bytes(b"of a process that was killed")
    capsys.readouterr()
    assert run(drawn, tmp_path / "r", epochs=3, resume="auto") == 0
    out = capsys.readouterr().out
    assert "3.pth: damaged, truncated or no checkpoint (BadZipFile('wrong checksum of" in out
    assert "passed over " in out and "2.pth: damaged" in out and "1.pth after epoch 1" in out
    assert all(torch.equal(value, whole[name]) for name, value in read_checkpoint(folder / "3.pth")["model"].items())
    assert not list(folder.glob(".*"))


def test_nothing_to_resume_is_said(drawn, tmp_path, capsys):
    assert run(drawn, tmp_path / "r", epochs=1, resume="auto") == 0
    assert "nothing to resume in" in capsys.readouterr().out


def test_tensorboard_is_written_where_it_is_asked_for(drawn, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorboard", None)  # as where it is not installed
        assert run(drawn, tmp_path / "r", epochs=1, tensorboard=True) == 2
        assert "--tensorboard needs the package tensorboard: pip install tensorboard" in capsys.readouterr().err
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard here")
    assert run(drawn, tmp_path / "r", epochs=2, tensorboard=True) == 0
    events = accumulator.EventAccumulator(str(tmp_path / "r/logs")).Reload()
    for kind, name, at in (("train", "loss", "step"), ("val", "miou", "epoch")):
        expected = [(record[at], pytest.approx(record[name])) for record in records(tmp_path / "r", kind)]
        assert [(event.step, event.value) for event in events.Scalars(f"{kind}/{name}")] == expected


def test_split_without_a_label_stops_with_a_message(drawn, tmp_path, capsys):
    root = tmp_path / "void"
    shutil.copytree(drawn, root)
    for path in (root / "gtFine/val/street").glob("*_labelIds.png"):
        Image.new("L", (192, 96), 0).save(path)
    assert run(root, tmp_path / "r", epochs=1) == 2
    assert "no pixel of split val has a label" in capsys.readouterr().err


def test_frozen_batch_norm_keeps_its_statistics(drawn, tmp_path):
    assert run(drawn, tmp_path / "r", epochs=1, freeze_bn=True) == 0
    state = read_checkpoint(tmp_path / "r/checkpoints/1.pth")["model"]
    assert all((state[name] == 0).all() for name in state if name.endswith("running_mean"))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in FastSCNN(aux=True).modules()) == sum(
        n.endswith("running_mean") for n in state
    )


def test_the_table_of_recipes_is_made_once(drawn, tmp_path):
    table = ["--dataset", "cityscapes", "--data", str(drawn), "--out", str(tmp_path), "--epochs", "1", "--jobs", "2"]
    table += ["--add", "--crop-size 64 96", "--seeds", "0", "--only", "base", "ema 0.99"]
    first, again = (run_script("tests/benchmarks/recipes.py", *table) for _ in range(2))
    assert first.returncode == again.returncode == 0, first.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.stdout.splitlines() if line.startswith("|")]
    assert [row[:3] for row in rows[2:]] == [["base", "``", "1"], ["ema 0.99", "`--ema 0.99`", "1"]]
    for line in (tmp_path / "results.jsonl").read_text().splitlines():
        record = json.loads(line)
        [folder] = tmp_path.glob(f"{record['name'].replace(' ', '-')}-*")
        # Without a picked epoch: the figure is that of the last validation.
        assert record["miou"] == pytest.approx(records(folder, "val")[-1]["miou"], abs=1e-3)
        assert f"{record['miou']:.4f} to {record['miou']:.4f}" in first.stdout
    assert again.stdout.strip() in first.stdout and "seed 0" not in again.stdout
