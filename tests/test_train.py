"""Training: the recipe by hand, complete runs, one process against two, and what is refused."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import eval as evaluation
import train
from conftest import ROOT, run_ranks, run_script
from data import IGNORE, DataError
from launch import UsageError, exit_status
from model import CheckpointError, FastSCNN, load_weights, read_checkpoint
from ops_ext import accelerate
from train import learning_rate, segmentation_loss


def flags(root, out, **changes):
    """A short run on drawn scenes, in float32: 3 steps an epoch."""
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


def train_status(argv):
    """What train.py does with the command line; its exit status."""
    return exit_status(lambda: train.main(argv), (DataError, CheckpointError))


def run(*args, **changes):
    """train.py in this process, whose signal handlers are put back; its exit status."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return train_status(flags(*args, **changes))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def records(out, kind):
    lines = (out / "logs/metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(out):
    return [record["loss"] for record in records(out, "train")]


# -------------------------------------------------------------------------------------------------- recipe and schedule


def test_recipes_set_flags_that_exist_and_flags_beside_them_win():
    plain = vars(train.parse_args([]))
    for recipe, by_dataset in train.RECIPES.items():
        for dataset, choices in by_dataset.items():
            assert choices.keys() <= plain.keys(), "a recipe sets what is not a flag"
            args = train.parse_args(["--recipe", recipe, "--dataset", dataset])
            assert {name: getattr(args, name) for name in choices} == choices
    paper = train.parse_args(["--recipe", "paper", "--batch-size", "6"])
    assert (paper.batch_size, paper.base_lr, paper.epochs, paper.lr) == (6, 0.045, 1000, 0.045 * 6 / 12)
    assert (paper.ohem, paper.ema, paper.class_balance) == (0, 0, 0)


def test_images_to_train_and_to_validate_on_are_counted_and_said(folder_dataset, tmp_path):
    options = {"dataset": "folder", "crop_size": (32, 48), "batch_size": 2, "epochs": 1}
    for split, numbers in (("train", (2, 2, 0)), ("train+val", (4, 2, 2))):
        text = "{} images to train, {} to validate, {}".format(*numbers)
        assert run(folder_dataset, tmp_path / split, **options, split=split) == 0
        assert f"{text} of them in both" in (tmp_path / split / "logs/train.log").read_text()


def test_the_scale_of_the_images_holds_in_training_and_validation_and_is_stored(drawn, tmp_path, monkeypatch):
    datasets = train.open_datasets(
        train.parse_args(["--data", str(drawn), "--scale", "1.5", "--scale-range", "1", "2"])
    )
    assert datasets[0].augmentation.scale_range == (1.5, 3.0)
    seen = []

    def watched(model, **options):
        segment = accelerate(model, **options)
        return lambda images, *size: seen.append(tuple(images.shape)) or segment(images, *size)

    monkeypatch.setattr(train, "accelerate", watched)
    assert run(drawn, tmp_path, epochs=1, scale=1.5) == 0
    assert seen == [(1, 144, 288, 3)] * 5
    checkpoint = read_checkpoint(tmp_path / "checkpoints/best_model.pth")
    assert checkpoint["scale"] == 1.5 and checkpoint["image_hw"] == [144, 288]
    done = run_script("eval.py", "--weights", tmp_path / "checkpoints/best_model.pth", "--data", drawn)
    result, logged = json.loads(done.stdout.splitlines()[-1]), records(tmp_path, "val")[-1]
    assert result["scales"] == [1.5] and result["miou"] == logged["miou"]


def test_wrong_labels_of_val_are_found_before_the_first_step(folder_dataset, tmp_path, capsys):
    Image.new("L", (64, 48), 77).save(folder_dataset / "labels/val/1.png")
    assert run(folder_dataset, tmp_path, dataset="folder", crop_size=(32, 48), batch_size=2, val_every=9) == 2
    assert "labels/val/1.png: label value 77" in capsys.readouterr().err
    assert not list(tmp_path.glob("logs/metrics.jsonl")) or not records(tmp_path, "train")


def test_crops_that_show_little_of_large_photos_are_said(folder_dataset, tmp_path, capsys):
    for kind in ("images", "labels"):
        for path in folder_dataset.glob(f"{kind}/train/*.png"):
            Image.open(path).resize((640, 480), Image.Resampling.NEAREST).save(path)
    options = {"dataset": "folder", "crop_size": (48, 64), "batch_size": 2, "epochs": 1}
    assert run(folder_dataset, tmp_path / "large", **options) == 0
    assert "a crop shows 1% of an image: add --scale 0.1 to see nearly all of it" in capsys.readouterr().out
    assert run(folder_dataset, tmp_path / "small", **options, scale=0.1) == 0
    assert "a crop shows" not in capsys.readouterr().out


def test_the_loader_for_validation_is_made_once(drawn, tmp_path, monkeypatch):
    made = []
    loader = evaluation.DataLoader
    monkeypatch.setattr(evaluation, "DataLoader", lambda *args, **options: made.append(1) or loader(*args, **options))
    assert run(drawn, tmp_path, epochs=3, workers=1) == 0
    assert len(records(tmp_path, "val")) == 3 and len(made) == 1


def test_a_signal_before_the_first_batch_is_obeyed(drawn, tmp_path):
    """At any time of the start: 143 as by default, or 75 where the signal is handled already."""
    for number, seconds in enumerate((0.2, 1.5, 3, 4)):
        argv = flags(drawn, tmp_path / str(number), epochs=1000, workers=2)
        process = subprocess.Popen([sys.executable, ROOT / "train.py", *argv], stderr=subprocess.PIPE, text=True)
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGTERM, train.STOPPED) and "memory" not in errors, errors


def test_threads_of_a_training_spin_briefly_unless_the_user_says_otherwise():
    for given, expected in (({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | given
        command = [sys.executable, "-c", "import os, launch; print(os.environ['GOMP_SPINCOUNT'])"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr


def test_batch_divides_over_the_processes_or_is_refused(monkeypatch):
    for world_size in (1, 2, 4, 8):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        train.parse_args([])
    with pytest.raises(UsageError, match="--batch-size 12 is no multiple of 8 processes; use .8, 16."):
        train.parse_args(["--batch-size", "12"])


def test_poly_schedule_with_warm_up_by_hand():
    # Of 20 steps a tenth are warm-up: a third, two thirds, then all of the poly schedule's rate.
    rates = [learning_rate(step, 20, 0.1) for step in (0, 1, 2, 10, 19)]
    assert rates == pytest.approx([0.1 / 3, 0.2 / 3 * 0.95**0.9, 0.1 * 0.9**0.9, 0.1 * 0.5**0.9, 0.1 * 0.05**0.9])
    # Of a long run 200 steps.
    rates = [learning_rate(step, 10_000, 0.1) for step in (99, 200)]
    assert rates == pytest.approx([0.1 * 100 / 201 * 0.9901**0.9, 0.1 * 0.98**0.9])


def test_weight_decay_spares_depthwise_kernels_norms_and_biases():
    model = FastSCNN(19, aux=True)
    decayed, others = train.make_optimizer(model, 0.1).param_groups
    assert decayed["weight_decay"] == 4e-5 and others["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    spared = {names[id(p)] for p in others["params"]}
    assert len(decayed["params"]) + len(spared) == len(names)
    for name, p in model.named_parameters():
        depthwise = p.ndim == 4 and p.shape[1] == 1
        assert (name in spared) == (p.ndim == 1 or depthwise), name
    assert sum(p.ndim == 4 for p in others["params"]) == 2 + 9 + 1 + 2  # depthwise kernels of the four stages


def test_moving_average_by_hand():
    layer = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1))
    average = train.MovingAverage(layer, 0.5)
    weight, mean = layer[0].weight.item(), 0.0
    for step, decay in ((1, 0.1), (2, 2 / 11), (3, 0.25), (20, 0.5)):
        average.steps = step - 1
        layer[0].weight.data.fill_(step)
        layer[1].running_mean.fill_(-2 * step)
        average.update()
        weight, mean = decay * weight + (1 - decay) * step, decay * mean - (1 - decay) * 2 * step
        assert average.model[0].weight.item() == pytest.approx(weight)
        assert average.model[1].running_mean.item() == pytest.approx(mean)
    assert layer[0].weight.item() == 20


# ----------------------------------------------------------------------------------------------------------------- loss


def test_loss_of_equal_scores_by_hand():
    target = torch.zeros(1, 8, 8, dtype=torch.uint8)
    target[0, 0, 0] = IGNORE
    flat = torch.zeros(1, 2, 4, 4)  # ln 2 for each of the 63 pixels that count
    heads = (flat, flat, flat[..., :1, :1])
    assert segmentation_loss(flat, target).item() == pytest.approx(math.log(2))
    assert segmentation_loss(heads, target).item() == pytest.approx(1.8 * math.log(2))


def plain_loss(main, aux, target, weights, probability):
    """The same loss, restated at full resolution in float64; and which pixels of the main head count."""

    def each_pixel(scores, weights):
        scores = F.interpolate(scores, target.shape[1:], mode="bilinear")
        return F.cross_entropy(scores, target.long(), weights, ignore_index=IGNORE, reduction="none")

    labelled = target != IGNORE
    weight = weights[target.where(labelled, 0).long()] * labelled
    kept = labelled
    if probability:  # by the true class's probability, whatever its weight
        bare = each_pixel(main.detach(), None)
        sample = bare[:, ::4, ::4]
        hardest = sample[labelled[:, ::4, ::4]].sort(descending=True).values[sample.numel() // 16 - 1]
        kept = labelled & (bare >= min(-math.log(probability), hardest))
    main, aux = each_pixel(main, weights), each_pixel(aux, weights)
    return (main * kept).sum() / (weight * kept).sum() + 0.4 * aux.sum() / weight.sum(), kept


def test_loss_and_gradient_of_hard_pixels_and_weighted_classes():
    torch.manual_seed(0)
    main, aux = (2 * torch.randn(2, 5, 12, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    target = torch.randint(0, 5, (2, 96, 128)).to(torch.uint8)
    target[:, :30, :50] = IGNORE
    balance = torch.tensor([0.2, 1.0, 3.0, 0.5, 1.5]).double()
    for probability, weights in itertools.product((0, 0.7, 0.99, 0.3, 1e-4), (None, balance)):
        plain_weights = torch.ones(5).double() if weights is None else weights
        expected, kept = plain_loss(main, aux, target, plain_weights, probability)
        if probability == 1e-4:  # almost no pixel is that hard: it is the sixteenth
            assert 0.03 < kept.float().mean() < 0.1
        loss = segmentation_loss((main, aux), target, class_weights=weights, ohem=probability)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        for got, want in zip(torch.autograd.grad(loss, (main, aux)), torch.autograd.grad(expected, (main, aux))):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-9)


def test_loss_of_unlabelled_images_is_0():
    target = torch.full((1, 64, 64), IGNORE, dtype=torch.uint8)
    for options in ({}, {"ohem": 0.7}, {"class_weights": torch.ones(3)}):
        scores = torch.randn(1, 3, 8, 8, requires_grad=True)
        loss = segmentation_loss((scores, scores), target, **options)
        loss.backward()
        assert loss == 0 and not scores.grad.any()


def test_class_weights_by_hand_and_their_fading(folder_dataset, tmp_path, monkeypatch):
    # Columns of 20, 20 and 24 pixels; the last class of the four does not occur.
    fields = {"names": ["left", "middle", "right", "none"]}
    (folder_dataset / "classes.json").write_text(json.dumps(fields))
    shares = train.class_shares(data.open_dataset("folder", folder_dataset, "train"))
    torch.testing.assert_close(shares, torch.tensor([20, 20, 24, 0]).double() / 64)
    raw = [3.2**0.5, 3.2**0.5, (64 / 24) ** 0.5, 0]
    mean = raw[0] * 40 / 64 + raw[2] * 24 / 64
    assert train.class_weights(shares, 0.5).tolist() == pytest.approx([each / mean for each in raw])
    assert train.class_weights(shares, 0).tolist() == [1, 1, 1, 0]

    powers, weights = [], train.class_weights
    monkeypatch.setattr(train, "class_weights", lambda shares, power: powers.append(power) or weights(shares, power))
    options = {"dataset": "folder", "epochs": 4, "crop_size": (32, 48), "class_balance": 0.5}
    (folder_dataset / "classes.json").write_text(json.dumps({"names": ["left", "middle", "right"]}))
    assert run(folder_dataset, tmp_path / "r", **options) == 0
    assert powers == pytest.approx([0.5, 0.375, 0.25, 0.125])
    assert records(tmp_path / "r", "val")[0]["class_iou"].keys() == {"left", "middle", "right"}


# ------------------------------------------------------------------------------------------------------------ log lines


class Heard:
    """A log that keeps what it is told."""

    def __init__(self):
        self.lines, self.records = [], []

    def line(self, text):
        self.lines.append(text)

    def record(self, **fields):
        self.records.append(fields)


def test_log_counts_steps_at_half_resolution_as_a_quarter_and_skipped_ones_not():
    # 100 steps, the first 80 at half resolution: 40 full steps of work in all.
    half = SimpleNamespace(augmentation=SimpleNamespace(half_epochs=8))
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.05}])
    state = SimpleNamespace(steps_per_epoch=10, world_size=1, train_set=half, optimizer=optimizer, skipped_in_a_row=0)
    state.args, log = SimpleNamespace(epochs=10, batch_size=4), Heard()
    finite, skipped = torch.tensor([2.0, 1.0]), torch.tensor([math.nan, 0.0])
    train.log_steps(state, 4, 40, [*[finite] * 38, skipped, finite], 10.0, log)
    assert log.lines[0] == (
        "epoch 4/10  step 40/100  loss 2.0000  lr 0.05000  16.0 images/s  left 0:00:30  skipped 1 steps"
    )
    assert log.records[0] == {
        "kind": "train", "epoch": 4, "step": 40, "loss": 2.0, "lr": 0.05, "images_per_s": 16.0, "seconds": 10.0,
        "skipped": 1,
    }  # fmt: skip
    train.log_steps(state, 10, 100, [skipped], 10.0, log)
    assert "loss nan  lr 0.05000  0.4 images/s  left 0:00:00  skipped 1 steps" in log.lines[1]
    assert log.records[1]["loss"] is None and state.skipped_in_a_row == 1


# -------------------------------------------------------------------------------------------------------- complete runs


def test_a_run_learns_and_writes_what_it_says(drawn, tmp_path, capsys, monkeypatch):
    clock = itertools.count()  # each look at it is a second later
    monkeypatch.setattr(train.time, "perf_counter", lambda: float(next(clock)))
    out = tmp_path / "runs"
    assert run(drawn, out, epochs=5, keep=2, workers=1, base_lr=0.15, log_every=2) == 0
    trained, validated = records(out, "train"), records(out, "val")
    # A record for every second step of all, and for the last of an epoch.
    assert [record["step"] for record in trained] == [2, 3, 4, 6, 8, 9, 10, 12, 14, 15]
    assert [record["images_per_s"] for record in trained] == [8, 4, 4, 8, 8, 4, 4, 8, 8, 4]
    assert sum(losses(out)[-3:]) < 0.85 * sum(losses(out)[:3])
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["4.pth", "5.pth", "best_model.pth"]
    assert [record["epoch"] for record in validated] == [1, 2, 3, 4, 5]
    best = torch.load(out / "checkpoints/best_model.pth", weights_only=True)
    assert best["miou"] == max(record["miou"] for record in validated)
    assert best["classes"]["names"][0] == "road" and len(best["classes"]["colours"]) == 19
    assert load_weights(out / "checkpoints/best_model.pth", num_classes=19).args["num_classes"] == 19
    log = (out / "logs/train.log").read_text()
    assert "learning rate 0.15 x 4 / 12 = 0.05000" in log and "batch 4 = 4 x 1" in log
    assert "12 images to train, 5 to validate, 0 of them in both  3 steps x 5 epochs" in log
    assert "upsample_argmax" in log
    assert f"epoch 5/5  mIoU {validated[-1]['miou']:.4f}" in log and "done: best mIoU" in log
    assert log.strip() in capsys.readouterr().out


def unevenly_labelled(drawn, root):
    """The drawn scenes with most labels of every second image ignored."""
    shutil.copytree(drawn, root)
    for path in sorted((root / "gtFine/train/street").glob("*_labelIds.png"))[::2]:
        label = Image.open(path)
        label.paste(0, (0, 0, label.width, label.height - 8))
        label.save(path)
    return root


def train_without_batch_statistics(argv):
    """With batch normalisation by the running statistics, since PyTorch synchronises it on no CPU."""
    nn.BatchNorm2d.train = lambda self, mode=True: nn.Module.train(self, False)
    return train_status(argv)


def test_two_processes_take_the_steps_of_one(drawn, tmp_path):
    # One process has most of its labels ignored: a mean of means would weight its few pixels far too much.
    root = unevenly_labelled(drawn, tmp_path / "uneven")
    options = {"dropout": 0, "ema": 0.9, "ohem": 0.7, "class_balance": 0.5, "half_resolution": 0.5, "val_every": 2}
    one = run_ranks(tmp_path, train_without_batch_statistics, flags(root, tmp_path / "one", **options), world_size=1)
    argv = flags(root, tmp_path / "two", **options, cache="ram", workers=1)
    two = run_ranks(tmp_path, train_without_batch_statistics, argv)
    assert one[0] == [0] and two[0] == [0, 0], one[1] + two[1]
    assert "Grad strides do not match" not in two[1]
    assert len(losses(tmp_path / "one")) == 6
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    for part in ("trained", "model"):
        a, b = (read_checkpoint(tmp_path / name / "checkpoints/2.pth")[part] for name in ("one", "two"))
        for name, value in a.items():
            torch.testing.assert_close(b[name], value, rtol=1e-3, atol=1e-5, msg=name)
    mious = [records(tmp_path / name, "val")[-1]["miou"] for name in ("one", "two")]
    assert mious[1] == pytest.approx(mious[0], abs=2e-3)
    assert "no SyncBatchNorm: each process normalises over its own 2 images" in two[1] and "batch 4 = 2 x 2" in two[1]
    assert two[1].count("cache ram: 2 of 2 splits") == 1


def test_records_out_of_the_ram_cache_are_the_same(drawn, tmp_path):
    for cache in ("none", "ram"):
        assert run(drawn, tmp_path / cache, cache=cache, epochs=1, workers=1) == 0
    assert losses(tmp_path / "ram") == losses(tmp_path / "none")
    assert records(tmp_path / "ram", "val") == records(tmp_path / "none", "val")


def test_loss_scale_in_float16(drawn, tmp_path):
    options = {"epochs": 1, "batch_size": 6, "crop_size": (32, 64)}  # small, since the CPU is slow at it
    assert run(drawn, tmp_path / "exact", **options) == 0
    assert run(drawn, tmp_path / "fixed", **options, amp="fp16", loss_scale=128) == 0
    assert read_checkpoint(tmp_path / "fixed/checkpoints/1.pth")["scaler"]["scale"] == 128
    assert losses(tmp_path / "fixed") == pytest.approx(losses(tmp_path / "exact"), rel=0.02)
    # A scale of 2^16 makes the first gradients overflow; each skipped step halves it.
    options |= {"epochs": 2, "val_every": 2}
    assert run(drawn, tmp_path / "dynamic", **options, amp="fp16") == 0
    skipped = sum(record["skipped"] for record in records(tmp_path / "dynamic", "train"))
    checkpoint = read_checkpoint(tmp_path / "dynamic/checkpoints/2.pth")
    assert checkpoint["scaler"]["scale"] == 2.0 ** (16 - skipped) and 1 <= skipped < 4


def test_real_cityscapes_trains_at_full_size(cityscapes_sample, tmp_path):
    options = {"epochs": 1, "batch_size": 2, "crop_size": (256, 512), "workers": 1, "amp": "auto"}
    assert run(cityscapes_sample, tmp_path / "r", **options) == 0
    assert losses(tmp_path / "r") and all(0 < loss < 10 for loss in losses(tmp_path / "r"))
    (result,) = records(tmp_path / "r", "val")
    assert 0 < result["pixel_accuracy"] < 1 and result["class_iou"]["train"] is None


def test_camvid_trains(camvid, tmp_path):
    root = tmp_path / "few"  # four images of it, to be quick
    for split in ("train", "val"):
        for kind in (split, f"{split}annot"):
            (root / kind).mkdir(parents=True)
            for path in sorted((camvid / kind).iterdir())[:4]:
                shutil.copy(path, root / kind)
    assert run(root, tmp_path / "r", dataset="camvid", epochs=1, crop_size=(180, 240)) == 0
    assert records(tmp_path / "r", "val")[0]["class_iou"].keys() == set(data.CAMVID.names)


def test_init_weights_match_the_rows_of_the_head_by_class_name(drawn, folder_dataset, tmp_path):
    options = {"dataset": "folder", "crop_size": (32, 48), "epochs": 1, "base_lr": 0}
    assert run(folder_dataset, tmp_path / "a", **options, seed=1) == 0
    source = read_checkpoint(tmp_path / "a/checkpoints/1.pth")["model"]
    names = ["right", "new", "left"]
    (folder_dataset / "classes.json").write_text(json.dumps({"names": names}))
    assert run(folder_dataset, tmp_path / "fresh", **options) == 0
    assert run(folder_dataset, tmp_path / "b", **options, init_weights=tmp_path / "a/checkpoints/1.pth") == 0
    assert "new classes: new" in (tmp_path / "b/logs/train.log").read_text()
    fresh, model = (read_checkpoint(tmp_path / name / "checkpoints/1.pth")["model"] for name in ("fresh", "b"))
    heads = 0
    for name, value in model.items():
        if name.startswith(("classifier.conv.", "aux_detail.conv.", "aux_context.conv.")):
            heads += 1
            assert torch.equal(value, torch.stack([source[name][2], fresh[name][1], source[name][0]])), name
        elif name.endswith("weight"):
            assert torch.equal(value, source[name]), name
    assert heads == 6
    assert (
        run(folder_dataset, tmp_path / "c", **options, variant="tramac", init_weights=tmp_path / "a/checkpoints/1.pth")
        == 2
    )


def test_tensorboard_is_written_where_it_is_asked_for(drawn, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard here")
    assert run(drawn, tmp_path / "r", epochs=1, tensorboard=True) == 0
    accumulator = events.EventAccumulator(str(tmp_path / "r/logs")).Reload()
    for kind, name, at in (("train", "loss", "step"), ("val", "miou", "epoch")):
        expected = [(record[at], pytest.approx(record[name])) for record in records(tmp_path / "r", kind)]
        assert [(event.step, event.value) for event in accumulator.Scalars(f"{kind}/{name}")] == expected


# ------------------------------------------------------------------------------------------------------------ bad input


def refused(capsys, message, *args, **changes):
    """The run ends with one line that says so."""
    capsys.readouterr()
    assert run(*args, **changes) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


def test_flags_that_cannot_work_are_refused(drawn, tmp_path, capsys):
    for changes, message in (
        ({"epochs": 0}, "argument --epochs: 0 is not in [1, inf]"),
        ({"epochs": "x"}, "argument --epochs: invalid int value: 'x'"),
        ({"crop_size": (16, 64)}, "argument --crop-size: 16 is not in [32"),
        ({"base_lr": math.nan}, "argument --base-lr: nan is not in [0"),
        ({"ema": 1}, "argument --ema: 1 is not in [0, 0.99999]"),
        ({"amp": "int8"}, "invalid choice: 'int8'"),
        ({"loss_scale": "large"}, "argument --loss-scale: invalid loss_scale value: 'large'"),
        ({"batch_size": 1}, "--batch-size 1 is one per process, too few for batch normalisation"),
        ({"split": "trian"}, "no images"),
        ({"dataset": "voc"}, "voc"),
        ({"resume": "/none/3.pth"}, "/none/3.pth: no such checkpoint"),
    ):
        refused(capsys, message, drawn, tmp_path / "r", **changes)
    assert not (tmp_path / "r").exists()
    train_set, _ = train.open_datasets(train.parse_args(flags(drawn, tmp_path, scale_range=(2.0, 0.5))))
    assert train_set.augmentation.scale_range == (0.5, 2.0)  # in either order


def test_bad_data_is_one_line_and_leaves_no_checkpoint(folder_dataset, tmp_path, capsys):
    label, image = folder_dataset / "labels/train/1.png", folder_dataset / "images/train/1.png"
    contents = {path: path.read_bytes() for path in (label, image)}
    for workers, (path, content) in itertools.product((0, 1), ((label, b"no picture"), (image, contents[image][:60]))):
        path.write_bytes(content)
        options = {"dataset": "folder", "crop_size": (32, 48), "workers": workers}
        refused(capsys, f"{path}: ", folder_dataset, tmp_path / "r", **options)
        path.write_bytes(contents[path])
    assert not list(tmp_path.rglob("*.pth"))


def test_split_without_a_label_stops_with_a_message(folder_dataset, tmp_path, capsys):
    for path in (folder_dataset / "labels/val").iterdir():
        Image.new("L", (64, 48), 255).save(path)
    options = {"dataset": "folder", "crop_size": (32, 48)}
    refused(capsys, "labels/val: no pixel has a label", folder_dataset, tmp_path / "r", **options)


def test_output_that_cannot_be_written_is_one_line_before_the_first_step(drawn, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    refused(capsys, f"{tmp_path / 'file'}", drawn, tmp_path / "file/runs")
    assert "step 1/" not in capsys.readouterr().out
