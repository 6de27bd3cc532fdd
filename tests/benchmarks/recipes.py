"""What each part of the recipe is worth: named sets of train.py's flags, several seeds each, as a table of mIoU.

    python tests/benchmarks/recipes.py --epochs 24 --seeds 0 1 2 --jobs 2
    python tests/benchmarks/recipes.py --only base "ohem 0.7"               # some of them
    python tests/benchmarks/recipes.py --only paper best                    # train.py's recipes
    python tests/benchmarks/recipes.py --folds 0001TP 0006R0 0016E5     # train on all drives but one, score on that
    python tests/benchmarks/recipes.py --add "--half-resolution 1" --scale 0.5     # four times as fast

Each run is a process of its own with one seed; --jobs of them share the cores (on GPUs: 1). What counts is the mIoU
after the last epoch. Finished runs are kept in OUT/results.jsonl and not repeated: a longer list or more seeds add to a
table. An element is the base with that element; its gain is the difference of the means. A fold is a prefix of names.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data import DataError, find_samples  # noqa: E402

# The base is train.py's defaults with CamVid's size, a smaller batch at a rate that goes with it, less resizing; each
# other element changes one thing.
MACHINE = "--workers 0 --cache ram"
BASE = f"{MACHINE} --crop-size 360 480 --scale-range 0.75 1.75 --batch-size 4 --base-lr 0.135"
ELEMENTS = {
    "base": "",
    "class balance 0.5": "--class-balance 0.5",
    "class balance 0.25": "--class-balance 0.25",
    "ohem 0.7": "--ohem 0.7",
    "ema 0.99": "--ema 0.99",
    "half the rate": "--base-lr 0.0675",
    "twice the rate": "--base-lr 0.27",
    "batch 8": "--batch-size 8 --base-lr 0.0675",
    "colour": "--colour-jitter 0.4 0.4 0.4 0.05",
    "strong colour": "--colour-jitter 0.6 0.6 0.6 0.1",
    "no dropout": "--dropout 0",
    "scale 0.5 to 2": "--scale-range 0.5 2",
    "half resolution first": "--half-resolution 0.5",
    "paper": "--recipe paper",  # these without the base
    "best": "--recipe best",
    "best, colour": "--recipe best --colour-jitter 0.4 0.4 0.4 0.05",
    "best, strong colour": "--recipe best --colour-jitter 0.6 0.6 0.6 0.1",
    "best, colour, scale": "--recipe best --colour-jitter 0.4 0.4 0.4 0.05 --scale-range 0.5 2",
    "best, strong colour, scale": "--recipe best --colour-jitter 0.6 0.6 0.6 0.1 --scale-range 0.5 2",
}


def call(script: str, flags: list[str], threads: int) -> str:
    """stdout of a script of this project."""
    command = [sys.executable, str(ROOT / script), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}: status {done.returncode}\n{done.stderr}")
    return done.stdout


def train_and_score(case: dict, out: Path, threads: int) -> dict:
    """The case and the figures of its network."""
    folder = out / f"{case['name'].replace(' ', '-')}-{zlib.crc32(json.dumps(case).encode()):08x}"
    data = ["--dataset", case["dataset"], "--data", case["data"]]
    epochs = str(case["epochs"])
    run = ["--epochs", epochs, "--val-every", epochs, "--seed", str(case["seed"]), "--keep", "1", "--out", str(folder)]
    splits = ["--split", case["split"], "--val-split", case["val_split"]]
    call("train.py", [*data, *shlex.split(case["flags"]), *splits, *run], threads)
    weights = ["--weights", str(folder / f"checkpoints/{epochs}.pth"), "--split", case["val_split"]]
    output = call("eval.py", [*data, *weights, "--scales", str(case["scale"]), "--workers", "0"], threads)
    figures = json.loads(output.splitlines()[-1])
    return {**case, **{name: figures[name] for name in ("miou", "pixel_accuracy", "class_iou")}}


def splits_of(fold: str | None, args: argparse.Namespace) -> dict[str, str]:
    """The split to train on and the one to score on; for a fold, files whose names begin with it are scored on."""
    if fold is None:
        return {"split": "train", "val_split": "val"}

    def joined(folds: list[str]) -> str:
        """The files of these folds in train and in val, where there are any."""
        parts = []
        for part in [f"{split}:{each}*" for each in folds for split in ("train", "val")]:
            with contextlib.suppress(DataError):
                find_samples(args.dataset, Path(args.data), part)
                parts.append(part)
        return "+".join(parts)

    return {"split": joined([each for each in args.folds if each != fold]), "val_split": joined([fold])}


def epochs_of(splits: dict[str, str], args: argparse.Namespace) -> int:
    """Of a run on these splits: --epochs, or as many as --images are."""
    if not args.images:
        return args.epochs
    parts = splits["split"].split("+")
    return round(args.images / sum(len(find_samples(args.dataset, Path(args.data), part)[0]) for part in parts))


def table(args: argparse.Namespace, records: list[dict]) -> list[str]:
    """Rows of Markdown: mean over seeds and folds, bounds of the seeds' means, gain over the base, and each fold."""
    folds = args.folds or [None]
    names = [fold for fold in folds if fold]
    header = ["element", "flags", "seeds", "mIoU, mean", "lowest to highest", "gain, points", *names]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    means: dict[str, float] = {}
    for name in args.only:
        scores = {(r["seed"], r["fold"]): r["miou"] for r in records if r["name"] == name}
        seeds = [s for s in args.seeds if all((s, fold) in scores for fold in folds)]
        if not seeds:
            continue
        by_seed = [statistics.mean(scores[seed, fold] for fold in folds) for seed in seeds]
        means[name] = statistics.mean(by_seed)
        gain = f"{100 * (means[name] - means['base']):+.1f}" if "base" in means else ""
        by_fold = [f"{statistics.mean(scores[seed, fold] for seed in seeds):.4f}" for fold in names]
        bounds = f"{min(by_seed):.4f} to {max(by_seed):.4f}"
        cells = [name, f"`{ELEMENTS[name]}`", str(len(seeds)), f"{means[name]:.4f}", bounds, gain, *by_fold]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="camvid", help="as of train.py (default: %(default)s)")
    add("--data", default=str(ROOT.parent / "shared" / "camvid"), help="its folder (default: %(default)s)")
    add("--folds", nargs="+", metavar="PREFIX", help="leave out the files of one prefix after the other")
    add("--epochs", type=int, default=24, help="of each run (default: %(default)s)")
    add("--images", type=int, help="instead of --epochs: images to train on in all, for folds of different size")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--only", nargs="+", choices=ELEMENTS, default=list(ELEMENTS), metavar="NAME", help=", ".join(ELEMENTS))
    add("--add", default="", metavar="FLAGS", help="more flags of train.py, for all runs")
    add("--scale", type=float, default=1.0, help="of the images in the last evaluation (default: %(default)s)")
    add("--jobs", type=int, default=1, help="runs at once, which share the cores (default: %(default)s)")
    add("--out", default=str(ROOT / "runs" / "recipes"), help="folder of the runs (default: %(default)s)")
    return parser


def main() -> None:
    """Runs what is missing, then prints the table."""
    args = get_args_parser().parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    records = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    common = {"dataset": args.dataset, "data": args.data, "scale": args.scale}
    splits = [{"fold": fold, **splits_of(fold, args)} for fold in args.folds or [None]]
    cases = [
        {
            "name": name,
            "seed": seed,
            "flags": " ".join([MACHINE if "--recipe" in ELEMENTS[name] else BASE, ELEMENTS[name], args.add]),
            "epochs": epochs_of(split, args),
            **split,
            **common,
        }
        for seed in args.seeds
        for name in args.only
        for split in splits
    ]
    known = [record for record in records if any(case.items() <= record.items() for case in cases)]
    missing = [case for case in cases if not any(case.items() <= record.items() for record in known)]

    def run(case: dict) -> None:
        record = train_and_score(case, out, max(1, (os.cpu_count() or 1) // args.jobs))
        known.append(record)
        with results.open("a") as file:
            print(json.dumps(record), file=file)
        print(f"{case['name']}, seed {case['seed']}, {case['fold'] or 'val'}: mIoU {record['miou']:.4f}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, missing))
    print("", *table(args, known), sep="\n")


if __name__ == "__main__":
    main()
