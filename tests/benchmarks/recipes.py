"""What each part of the recipe is worth: named sets of train.py's flags, several seeds each, as a table of val mIoU.

    python tests/benchmarks/recipes.py --dataset camvid --data ../shared/camvid --epochs 24 --seeds 0 1 2 --jobs 2
    python tests/benchmarks/recipes.py ... --only base ema ohem        # some of them
    python tests/benchmarks/recipes.py ... --add "--ema 0.99"          # another base for all of them
    python tests/benchmarks/recipes.py ... --add "--half-resolution 1" --scale 0.5     # four times as fast, for machines without a GPU

Each run is a process of its own with one seed; --jobs of them share the cores (on GPUs: take 1). What counts is the mIoU after the last
epoch: no epoch is picked by it. Finished runs are kept in OUT/results.jsonl and not done again, so that a longer list or more seeds
add to a table. "element" is the base with that element; the column of gains is the difference of the means.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The base is the paper's recipe with the crop and the batch of a small data set; every other name changes one thing.
BASE = "--crop-size 360 480 --scale-range 0.75 1.75 --batch-size 4 --base-lr 0.135 --workers 0 --cache ram"
ELEMENTS = {
    "base": "",
    "AdamW": "--optimizer adamw --base-lr 0.009 --weight-decay 0.02",
    "class balance 0.5": "--class-balance 0.5",
    "ohem 0.7": "--ohem 0.7",
    "ema 0.99": "--ema 0.99",
    "cosine": "--schedule cosine",
    "half the rate": "--base-lr 0.0675",
    "strong colour": "--brightness 0.4 --contrast 0.5 --saturation 0.5 --hue 18",
    "class share 0.5": "--max-class-share 0.5",
    "label smoothing 0.1": "--label-smoothing 0.1",
    "no dropout": "--dropout 0",
    "scale 0.5 to 2": "--scale-range 0.5 2",
    "no aux": "--no-aux",
    "aux weight 1": "--aux-weight 1",
    "batch 8": "--batch-size 8 --base-lr 0.0675",
    "class balance 0.25": "--class-balance 0.25",
    "class share 0.75": "--max-class-share 0.75",
    "bootstrapped 0.3": "--ohem 0.3",
    "twice the rate": "--base-lr 0.27",
    "half resolution first": "--half-resolution 0.5",
}


def run(name: str, seed: int, args: argparse.Namespace, threads: int) -> dict:
    """One training; its flags, mIoU after the last epoch, and time."""
    flags = [*shlex.split(BASE), *shlex.split(args.add), *shlex.split(ELEMENTS[name])]
    out = Path(args.out) / f"{name.replace(' ', '-')}-{seed}"
    command = [sys.executable, str(ROOT / "train.py"), "--dataset", args.dataset, "--data", args.data, *flags]
    command += [
        "--epochs",
        str(args.epochs),
        "--val-every",
        str(args.epochs),
        "--seed",
        str(seed),
        "--out",
        str(out),
        "--keep",
        "1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}: status {done.returncode}\n{done.stderr}")
    if args.scale == 1:
        lines = (out / "logs/metrics.jsonl").read_text().splitlines()
        last = [record for record in map(json.loads, lines) if record["kind"] == "val"][-1]
    else:
        command = [
            sys.executable,
            str(ROOT / "eval.py"),
            "--weights",
            str(out / f"checkpoints/{args.epochs}.pth"),
            "--workers",
            "0",
        ]
        command += ["--dataset", args.dataset, "--data", args.data, "--scales", str(args.scale)]
        last = json.loads(
            subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        )
    kept = {key: last[key] for key in ("miou", "pixel_accuracy", "class_iou")}
    return {"name": name, "seed": seed, "epochs": args.epochs, "scale": args.scale, "flags": shlex.join(flags), **kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="camvid", help="as of train.py (default: %(default)s)")
    parser.add_argument("--data", default=str(ROOT.parent / "shared" / "camvid"), help="its folder (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=24, help="of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=ELEMENTS, default=list(ELEMENTS), metavar="NAME", help=", ".join(ELEMENTS))
    parser.add_argument("--add", default="", metavar="FLAGS", help="more flags of train.py, for all runs")
    parser.add_argument("--scale", type=float, default=1.0, help="of the images in the last evaluation (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores (default: %(default)s)")
    parser.add_argument("--out", default=str(ROOT / "runs" / "recipes"), help="folder of the runs (default: %(default)s)")
    args = parser.parse_args()
    results = Path(args.out) / "results.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    records = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []

    def found(name: str, seed: int) -> dict | None:
        flags = shlex.join([*shlex.split(BASE), *shlex.split(args.add), *shlex.split(ELEMENTS[name])])
        wanted = (seed, args.epochs, args.scale, flags)
        same = (r for r in records if (r["seed"], r["epochs"], r["scale"], r["flags"]) == wanted)
        return next(same, None)

    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        missing = [(name, seed) for seed in args.seeds for name in args.only if not found(name, seed)]
        for record in pool.map(lambda each: run(*each, args, threads), missing):
            records.append(record)
            with results.open("a") as file:
                print(json.dumps(record), file=file)
            print(f"{record['name']}, seed {record['seed']}: mIoU {record['miou']:.4f}", flush=True)

    print(f"\n| element | flags | seeds | val mIoU, mean | lowest to highest | gain, points |\n|{'---|' * 6}")
    reference = [r["miou"] for seed in args.seeds if (r := found("base", seed))]
    for name in args.only:
        values = [r["miou"] for seed in args.seeds if (r := found(name, seed))]
        mean, bounds = statistics.mean(values), f"{min(values):.4f} to {max(values):.4f}"
        gain = f"{100 * (mean - statistics.mean(reference)):+.1f}" if reference else ""
        print(f"| {name} | `{ELEMENTS[name]}` | {len(values)} | {mean:.4f} | {bounds} | {gain} |")


if __name__ == "__main__":
    main()
