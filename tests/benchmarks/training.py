"""Training against the plain way to write it: time and memory of a step, samples of a loader, two processes against one.

    python tests/benchmarks/training.py [--data ../shared/cityscapes_sample --split train] [--device cuda]

Every case runs in a fresh process, one after the other. The plain step is in float32, contiguous, with F.interpolate and
F.cross_entropy at full resolution, an image at a time as torchvision's ToTensor and Normalize give it; the classic loader decodes,
resizes the whole image, crops, mirrors and recolours. Memory is what the process needs beyond its imports, at its peak.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import train  # noqa: E402
from data import IGNORE, MEAN, STD, Augmentation, RamCache, open_dataset, read_image, read_label  # noqa: E402
from eval import exit_status  # noqa: E402
from model import FastSCNN  # noqa: E402

CROPS, CROP, CLASSES = 4, (512, 1024), 19


# ----------------------------------------------------------------------------------------------------------------- step


def plain_step(device: torch.device, precision: torch.dtype | None, crops: int) -> Callable[[], None]:
    """A training step as it is mostly written."""
    model, optimizer, images, target = ingredients(device, crops)
    mean, std = (torch.tensor(each, device=device).view(3, 1, 1) for each in (MEAN, STD))
    pixels = torch.stack([(image.permute(2, 0, 1).contiguous().float() / 255 - mean) / std for image in images])
    labels = target.long()

    def step() -> None:
        with torch.autocast(device.type, precision, enabled=precision is not None):
            outputs = model(pixels, upsample=False)
            loss = sum(
                weight
                * F.cross_entropy(F.interpolate(output, CROP, mode="bilinear", align_corners=False), labels, ignore_index=255)
                for output, weight in zip(outputs, (1, train.AUX_WEIGHT, train.AUX_WEIGHT))
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def own_step(device: torch.device, precision: torch.dtype | None, crops: int) -> Callable[[], None]:
    """train.py's."""
    if device.type == "cpu":
        train.keep_freed_memory()
    model, optimizer, images, target = ingredients(device, crops)
    model.to(memory_format=torch.channels_last)
    amp = "off" if precision is None else "bf16"
    args = argparse.Namespace(amp=amp, loss_scale="dynamic", freeze_bn=False)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    run = train.Run(args, model, model, optimizer, scaler, device, 0, 1, False, None)
    return lambda: train.train_step(run, images, target)


def ingredients(device: torch.device, crops: int):
    torch.manual_seed(0)
    model = FastSCNN(CLASSES, aux=True).train().to(device)
    optimizer = torch.optim.SGD(train.parameter_groups(model, 4e-5), lr=1e-3, momentum=0.9)
    images = torch.randint(0, 256, (crops, *CROP, 3), dtype=torch.uint8).to(device)
    target = torch.randint(0, CLASSES, (crops, CROP[0] // 16, CROP[1] // 16), dtype=torch.uint8)
    target = target.repeat_interleave(16, 1).repeat_interleave(16, 2).to(device)
    return model, optimizer, images, target


def time_step(kind: str, device_name: str, precision: torch.dtype | None, crops: int) -> dict:
    """Median time of a step in ms and the process' peak memory in MiB."""
    device = torch.device(device_name)
    before = peak_mib(device)
    step = {"plain": plain_step, "train.py": own_step}[kind](device, precision, crops)
    inner = 1 if device.type == "cpu" else 10  # a GPU's clock is read from outside
    times = []
    for _ in range(3 + 9):
        start = time.perf_counter()
        for _ in range(inner):
            step()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append((time.perf_counter() - start) / inner * 1e3)
    return {"ms": statistics.median(times[3:]), "mib": peak_mib(device) - before}


def peak_mib(device: torch.device) -> float:
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return torch.cuda.max_memory_allocated(device) / 2**20


# --------------------------------------------------------------------------------------------------------------- loader


def time_loader(kind: str, data: str, split: str) -> dict:
    """Median time of a sample on one core, in ms."""
    torch.set_num_threads(1)
    dataset = open_dataset("cityscapes", data, split, Augmentation(CROP))
    if kind == "--cache ram":
        dataset.cache = RamCache(dataset, 1)
    samples = {"classic": lambda key: classic_sample(dataset, key)}
    sample = samples.get(kind, dataset.__getitem__)
    times = []
    for position in range(4 + 60):
        start = time.perf_counter()
        sample((0, position, position % len(dataset)))
        times.append((time.perf_counter() - start) * 1e3)
    return {"ms": statistics.median(times[4:])}


def classic_sample(dataset, key: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The same crop (but for rounding): decode, resize whole, crop, mirror, recolour."""
    epoch, position, index = key
    image = read_image(dataset.samples[index].image)
    label = read_label(dataset.samples[index].label, dataset.table)
    crop = dataset.augmentation.draw((image.height, image.width), (epoch, position))
    image = image.resize(crop.scaled_hw[::-1], Image.Resampling.BILINEAR)
    label = label.resize(crop.scaled_hw[::-1], Image.Resampling.NEAREST)
    top, left = crop.start
    box = (left, top, left + CROP[1], top + CROP[0])
    outside = Image.new("L", image.size, 255 - IGNORE).crop(box)  # Pillow fills with 0 where a box leaves the image
    image, label = image.crop(box), Image.composite(Image.new("L", CROP[::-1], IGNORE), label.crop(box), outside)
    if crop.flip:
        image, label = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), label.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gains = np.array(crop.colour)[[0, 5, 10], None]
    lookup = np.clip(np.arange(256) * gains + 0.5, 0, 255).astype(np.uint8)
    return np.array(image.point(lookup.ravel().tolist())), np.array(label)


# --------------------------------------------------------------------------------------------------------------- report


def in_fresh_process(function: Callable[..., dict], *arguments) -> dict:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def report(title: str, rows: dict[str, dict]) -> dict:
    print(f"\n{title}")
    first = next(iter(rows.values()))
    for name, row in rows.items():
        memory = f"{row['mib']:9.0f} MiB {row['mib'] / first['mib']:6.2f} of it" if "mib" in row else ""
        print(f"  {name:32} {row['ms']:9.1f} ms {first['ms'] / row['ms']:7.1f} x {memory}", flush=True)
    return {"title": title, **rows}


def time_processes(data: str, split: str, processes: int, threads: int) -> dict:
    """train.py --benchmark of a global batch of CROPS, shared out."""
    command = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *command, "train.py", "--data", data, "--split", split, "--val-split", split, "--cache", "ram"]
    flags = ["--batch-size", str(CROPS), "--workers", "0", "--benchmark", "8", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(ROOT.parent / "shared" / "cityscapes_sample"), help="a folder like Cityscapes'")
    parser.add_argument("--split", default="train", help="of it (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--crops", type=int, default=CROPS, help="images of a step (default: %(default)s)")
    args = parser.parse_args(argv)
    name = "CPU" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")

    rows = {}
    for kind in ("plain", "train.py"):
        for precision in (None, torch.bfloat16):
            title = f"{kind}, {'bfloat16' if precision else 'float32'}"
            rows[title] = in_fresh_process(time_step, kind, args.device, precision, args.crops)
    results = [report(f"training step, {args.crops} x 512x1024, two auxiliary heads", rows)]

    kinds = ("classic", "--cache none", "--cache ram")
    rows = {kind: in_fresh_process(time_loader, kind, args.data, args.split) for kind in kinds}
    results.append(report("loader, one core: an augmented 512x1024 crop and its labels", rows))

    if args.device == "cpu":
        print(f"\nprocesses and threads, {CROPS} crops a step in all, --cache ram, no workers")
        for processes, threads in ((1, 1), (1, 2), (2, 1)):
            result = time_processes(args.data, args.split, processes, threads)
            print(
                f"  {processes} x {threads}: {result['images_per_s']:.2f} images/s, step alone {result['step_images_per_s']:.2f}"
            )
            results.append(result)
    print(json.dumps({"device": name, "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    sys.exit(exit_status("training.py", lambda: main()))
