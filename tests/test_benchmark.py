"""tools/benchmark.py: what it times, the JSON object that it prints, and packages that are missing."""

import functools
import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch

import train
from conftest import ROOT, last_json, run_script
from launch import UsageError, start_processes
from model import FastSCNN
from tools import benchmark

STEPS = ("--crop-size", "32", "64", "--batch-size", "2", "--workers", "0", "--device", "cpu")


def test_the_json_object_of_one_size(capsys):
    flags = ["--size", "64", "96", "--batch-size", "2", "--repeats", "5", "--device", "cpu", "--amp", "off"]
    benchmark.main(flags)
    out = capsys.readouterr().out
    result = last_json(out)
    assert {key: result[key] for key in ("device", "precision", "size", "batch_size")} == {
        "device": "cpu", "precision": "fp32", "size": [64, 96], "batch_size": 2,
    }  # fmt: skip
    assert result["params"] == sum(parameter.numel() for parameter in FastSCNN().parameters())
    times = result["latency_ms"]
    assert 0 < times["min"] <= times["median"] <= times["p95"]
    assert result["fps"] == pytest.approx(2000 / times["median"], rel=1e-3)
    assert f"64x96, fp32: {times['median']:.1f} ms" in out and "sizes" not in result


def test_the_papers_sizes_and_other_runtimes(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "PAPER_SIZES", ((64, 96), (40, 40)))
    others = ["eager", "onnxruntime"]
    benchmark.main(["--repeats", "2", "--device", "cpu", "--against", *others])
    result = last_json(capsys.readouterr().out)
    assert [each["size"] for each in result["sizes"]] == [[64, 96], [40, 40]] and result["size"] == [64, 96]
    for each in result["sizes"]:
        assert set(each["against"]) == set(others)


def test_latency_leaves_the_warm_up_out():
    calls = []

    def segment(images):
        calls.append(images)
        time.sleep(0.2 if len(calls) <= benchmark.WARMUP else 0.01)
        return images

    figures = benchmark.latency_ms(segment, torch.zeros(1), repeats=4)
    assert len(calls) == benchmark.WARMUP + 4 and 10 <= figures["min"] <= figures["median"] <= figures["p95"] < 200


@pytest.mark.parametrize("name", ["eager", "compile", "onnxruntime"])
def test_other_runtimes_compute_the_same(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # Inductor takes 40 s
    torch.manual_seed(0)
    model = FastSCNN(5)
    images = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8)
    segment = benchmark.RUNTIMES[name](model, images, torch.device("cpu"))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    pixels = (images.permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        expected = model.eval()(pixels).argmax(1)
    assert segment(images).dtype == torch.uint8 and (segment(images) == expected).float().mean() > 0.999


@pytest.mark.parametrize("name, package", [("onnxruntime", "onnxruntime"), ("openvino", "openvino")])
def test_missing_packages_are_named(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=package):
        benchmark.main(["--size", "64", "96", "--repeats", "1", "--device", "cpu", "--against", name])


def test_flags_that_cannot_work_are_named():
    with pytest.raises(UsageError, match="--size 16 64: expected at least 32 pixels each"):
        benchmark.main(["--size", "16", "64"])
    with pytest.raises(UsageError, match="unrecognized arguments: --repeats 3"):  # which training does not use
        benchmark.main(["--train", "2", "--repeats", "3"])


def test_training_is_timed_in_two_processes(drawn, tmp_path):
    flags = ("--train", "2", "--data", drawn, "--cache", "ram", "--class-balance", "0.5", *STEPS, "--batch-size", "4")
    done = run_script("tools/benchmark.py", *flags, processes=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # of one process alone
    assert (result["processes"], result["batch_size"], result["crop_size"]) == (2, 4, [32, 64])
    for name in ("loader_images_per_s", "step_images_per_s", "images_per_s"):
        assert result[name] > 0
    assert not list(tmp_path.iterdir())  # nothing is written


def test_a_rate_is_the_images_of_the_batches_per_second(drawn):
    args = train.parse_args(["--data", str(drawn), *STEPS, "--amp", "off"])
    run = train.Run(args, train.open_datasets(args), *start_processes("cpu"))
    calls = []
    rate = benchmark.images_per_s(run, 3, lambda: (calls.append(1), time.sleep(0.1)))
    assert len(calls) == 3 and 10 < rate <= 20.01  # three batches of two images, a tenth of a second each


def test_the_benchmark_of_training_runs(drawn):
    flags = ("--data", drawn, "--crop-size", "32", "64", "--batch-size", "2", "--steps", "1", "--amp", "off")
    done = run_script("tests/benchmarks/training.py", *flags)
    assert done.returncode == 0, done.stderr
    rows = last_json(done.stdout)["rows"]
    assert len(rows) == 3 and all(row["step_images_per_s"] > 0 for row in rows.values())
    assert done.stdout.count("images/s for each worker") == 2


def test_the_benchmark_of_recipes_runs(folder_dataset, tmp_path):
    """On folds of which one has no file in val."""
    for kind in ("images", "labels"):
        (folder_dataset / kind / "val/0.png").unlink()
    flags = ("--dataset", "folder", "--data", folder_dataset, "--folds", "0", "1", "--epochs", "1", "--seeds", "3")
    flags += ("--only", "best", "--add", "--crop-size 64 96 --batch-size 2 --amp off", "--out", tmp_path)
    done = run_script("tests/benchmarks/recipes.py", *flags)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    splits = [(record["fold"], record["split"], record["val_split"]) for record in records]
    assert splits == [("0", "train:1*+val:1*", "train:0*"), ("1", "train:0*", "train:1*+val:1*")]
    mean = sum(record["miou"] for record in records) / 2
    assert f"| best | `--recipe best` | 1 | {mean:.4f} | {mean:.4f} to {mean:.4f} |" in done.stdout
    assert run_script("tests/benchmarks/recipes.py", *flags).stdout.strip() in done.stdout  # runs nothing again


def test_the_command_for_a_gpu_runs_dry_and_says_what_failed(tmp_path):
    command = ["bash", str(ROOT / "tests/benchmarks/gpu.sh"), "--dry"]
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    text = (tmp_path / "results.md").read_text()
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + text
    for title in ("kernels are built", "ops against plain PyTorch", "inference, batch 1", "training step"):
        assert f"### {title}: status 0, " in text
    for figure in ("upsample_argmax, noise, 64x96", "64x96, eager: ", "train.py, --amp bf16 --cache ram"):
        assert figure in text
    assert text.count("compute-sanitizer") == 2  # not run without a GPU, and that is said
    # Limits of the steps, in seconds, together.
    limits = re.findall(r'step ".*?" (\d+) ', (ROOT / "tests/benchmarks/gpu.sh").read_text())
    assert sum(map(int, limits)) + 45 <= 9 * 60  # one line is of two tools
    (tmp_path / "python").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        command, env={**environment, "PYTHON": str(tmp_path / "python")}, capture_output=True, text=True
    )
    assert done.returncode == 1 and "failed: training step" in done.stdout and "status 3" in done.stdout
