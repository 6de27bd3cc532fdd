"""train.py's step against a plain PyTorch one: time and memory; and images a second of the loader, for each worker.

    python tests/benchmarks/training.py [--data ../shared/cityscapes_sample --split train] [--device cuda]

The plain step is contiguous in memory, with F.interpolate and F.cross_entropy at full resolution, in float32 or under
autocast. Each row is a process of its own, one after the other; on an accelerator it has peak memory. train.py's
rows, with their loader, are those of `tools/benchmark.py --train`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import IGNORE, MEAN, STD
from launch import AMP_DTYPES
from model import FastSCNN
from tools.benchmark import WARMUP
from train import make_optimizer

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 19


def time_plain_step(args: argparse.Namespace, amp: str) -> dict:
    """Images a second of the plain step, and its memory in MiB."""
    device, dtype = torch.device(args.device), AMP_DTYPES[amp]
    torch.manual_seed(0)
    model = FastSCNN(CLASSES, aux=True).train().to(device)
    optimizer = make_optimizer(model, lr=1e-3)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    images = ((torch.rand(args.batch_size, 3, *args.crop_size) - mean) / std).to(device)
    target = torch.randint(0, CLASSES, (args.batch_size, *args.crop_size)).to(device)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            outputs = model(images)  # by F.interpolate at the images' size
            main, detail, context = (F.cross_entropy(output, target, ignore_index=IGNORE) for output in outputs)
        optimizer.zero_grad()
        (main + 0.4 * detail + 0.4 * context).backward()
        optimizer.step()

    for _ in range(WARMUP):
        step()
    start = time.perf_counter()
    for _ in range(args.steps):
        step()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    seconds = time.perf_counter() - start
    result = {"step_images_per_s": args.steps * args.batch_size / seconds}
    if device.type != "cpu":
        result["peak_memory_mib"] = round(torch.accelerator.max_memory_allocated() / 2**20)
    return result


def time_train(args: argparse.Namespace, *flags: str) -> dict:
    """What tools/benchmark.py says of train.py with these flags."""
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "--train", args.steps, "--workers", 0, *flags]
    command += ["--data", args.data, "--split", args.split, "--val-split", args.split, "--device", args.device]
    command += ["--batch-size", args.batch_size, "--crop-size", *args.crop_size]
    done = subprocess.run([str(each) for each in command], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default=str(ROOT.parent / "shared" / "cityscapes_sample"), help="a folder like Cityscapes'")
    add("--split", default="train", help="of it (default: %(default)s)")
    add("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    add("--amp", nargs="+", choices=AMP_DTYPES, default=["off", "bf16"], help="precisions (default: off bf16)")
    add("--batch-size", type=int, default=4, metavar="N", help="images of a step (default: %(default)s)")
    add("--crop-size", type=int, nargs=2, default=[512, 1024], metavar=("H", "W"), help="pixels (default: 512 1024)")
    add("--steps", type=int, default=9, metavar="N", help="timed steps of each row (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Prints the tables."""
    args = get_args_parser().parse_args(argv)
    rows = {}
    for amp in args.amp:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows[f"plain step, --amp {amp}"] = pool.apply(time_plain_step, (args, amp))
    for amp, cache in [*((amp, "none") for amp in args.amp), (args.amp[-1], "ram")]:
        rows[f"train.py, --amp {amp} --cache {cache}"] = time_train(args, "--amp", amp, "--cache", cache)
    first = next(iter(rows.values()))
    for name, row in rows.items():
        faster = row["step_images_per_s"] / first["step_images_per_s"]
        ms = 1000 * args.batch_size / row["step_images_per_s"]
        print(f"{name:36} {ms:9.1f} ms a step, {faster:.1f} x", end="")
        print(f", {row['peak_memory_mib']} MiB" if "peak_memory_mib" in row else "", end="")
        loader = row.get("loader_images_per_s")
        print(f", loader {loader:.1f} images/s for each worker" if loader else "", flush=True)
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
