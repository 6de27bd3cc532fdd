"""What each part of the recipe is worth: named sets of train.py's flags, several seeds each, as a table of val mIoU.

    python tests/benchmarks/recipes.py --dataset camvid --data ../shared/camvid --epochs 24 --seeds 0 1 2 --jobs 2
    python tests/benchmarks/recipes.py ... --only base cosine AdamW    # some of them
    python tests/benchmarks/recipes.py ... --only paper best           # train.py's recipes
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
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The base is train.py's defaults with CamVid's size, a smaller batch at a rate that goes with it, and less of a resize; every other
# name changes one thing.
MACHINE = "--workers 0 --cache ram"
BASE = f"{MACHINE} --crop-size 360 480 --scale-range 0.75 1.75 --batch-size 4 --base-lr 0.135"
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
    "class balance 0.75": "--class-balance 0.75",
    "class share 0.75": "--max-class-share 0.75",
    "bootstrapped 0.3": "--ohem 0.3",
    "twice the rate": "--base-lr 0.27",
    "half resolution first": "--half-resolution 0.5",
    "class balance 0.5 to 0": "--class-balance 0.5 --class-balance-end 0",
    "paper": "--recipe paper",  # these two without the base
    "best": "--recipe best",
}


@dataclass(frozen=True)
class Case:
    """One training: an element by name, and all that decides its result."""

    name: str
    dataset: str
    data: str
    epochs: int
    scale: float
    seed: int
    flags: str

    def run(self, out: Path, threads: int) -> dict:
        """Trains and evaluates in processes of their own; the case and its figures."""
        folder = out / f"{self.name.replace(' ', '-')}-{zlib.crc32(repr(self).encode()):08x}"
        data = ["--dataset", self.dataset, "--data", self.data]
        train = ["--epochs", str(self.epochs), "--val-every", str(self.epochs), "--seed", str(self.seed), "--out", str(folder)]
        self._call("train.py", [*data, *shlex.split(self.flags), *train, "--keep", "1"], threads)
        weights = ["--weights", str(folder / f"checkpoints/{self.epochs}.pth"), "--workers", "0", "--scales", str(self.scale)]
        figures = json.loads(self._call("eval.py", [*data, *weights], threads).splitlines()[-1])
        return {**asdict(self), **{name: figures[name] for name in ("miou", "pixel_accuracy", "class_iou")}}

    @staticmethod
    def _call(script: str, flags: list[str], threads: int) -> str:
        command = [sys.executable, str(ROOT / script), *flags]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)}: status {done.returncode}\n{done.stderr}")
        return done.stdout


def table(names: Sequence[str], found: Callable[[str], list[float]]) -> Iterator[str]:
    """Rows of Markdown: mean, bounds and gain over the base of the mIoUs that `found` gives for each name."""
    yield f"| element | flags | seeds | val mIoU, mean | lowest to highest | gain, points |\n|{'---|' * 6}"
    base = found("base")
    for name in names:
        if values := found(name):
            mean, bounds = statistics.mean(values), f"{min(values):.4f} to {max(values):.4f}"
            gain = f"{100 * (mean - statistics.mean(base)):+.1f}" if base else ""
            yield f"| {name} | `{ELEMENTS[name]}` | {len(values)} | {mean:.4f} | {bounds} | {gain} |"


def main() -> None:
    """Runs what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="camvid", help="as of train.py (default: %(default)s)")
    add("--data", default=str(ROOT.parent / "shared" / "camvid"), help="its folder (default: %(default)s)")
    add("--epochs", type=int, default=24, help="of each run (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--only", nargs="+", choices=ELEMENTS, default=list(ELEMENTS), metavar="NAME", help=", ".join(ELEMENTS))
    add("--add", default="", metavar="FLAGS", help="more flags of train.py, for all runs")
    add("--scale", type=float, default=1.0, help="of the images in the last evaluation (default: %(default)s)")
    add("--jobs", type=int, default=1, help="runs at once, which share the cores (default: %(default)s)")
    add("--out", default=str(ROOT / "runs" / "recipes"), help="folder of the runs (default: %(default)s)")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    records = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []

    def case(name: str, seed: int) -> Case:
        base = MACHINE if ELEMENTS[name].startswith("--recipe") else BASE
        flags = shlex.join(shlex.split(f"{base} {args.add} {ELEMENTS[name]}"))
        return Case(name, args.dataset, args.data, args.epochs, args.scale, seed, flags)

    def found(name: str) -> list[float]:
        cases = [asdict(case(name, seed)) for seed in args.seeds]
        return [record["miou"] for each in cases for record in records if each.items() <= record.items()]

    def run(each: Case) -> None:
        record = each.run(out, max(1, (os.cpu_count() or 1) // args.jobs))
        records.append(record)
        with results.open("a") as file:
            print(json.dumps(record), file=file)
        print(f"{record['name']}, seed {record['seed']}: mIoU {record['miou']:.4f}", flush=True)

    done = [record.items() for record in records]
    cases = [case(name, seed) for seed in args.seeds for name in args.only]
    with ThreadPoolExecutor(args.jobs) as pool:
        missing = (each for each in cases if not any(asdict(each).items() <= record for record in done))
        list(pool.map(run, missing))
    print("", *table(args.only, found), sep="\n")


if __name__ == "__main__":
    main()
