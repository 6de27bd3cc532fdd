"""Checks a dataset before training: reads every image and label map, and reports what is in them and what is wrong.

    python tools/check.py ROOT                                        # an own dataset, layout "folder"
    python tools/check.py --dataset camvid --data datasets/camvid --splits train --sheet sheet.png

Prints sizes and class shares; files that have no partner, cannot be read, or occur twice (above all in two splits);
label values of no class; label maps without a label. The last line is one JSON object. Exit status 2 for problems.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from data import IGNORE, DataError, SegmentationDataset, find_samples, read_classes, split_names
from eval import contact_sheet
from launch import OneLineParser, exit_status
from model import MIN_SIZE


def check(name: str, root: Path, splits: list[str]) -> dict:
    """What is in the given splits of a dataset, or in all, and what is wrong. Raises DataError for no such dataset."""
    classes, table = read_classes(name, root)
    contents, problems, notes, first_with = {}, [], [], {}  # the last one: the first image of every digest
    for split in splits or existing_splits(name, root):
        try:
            samples, unpaired = find_samples(name, root, split)
        except DataError as error:
            problems.append(str(error))
            continue
        if not samples and split not in ("train", "val"):
            notes.append(f"{split}: no label maps; its images can be predicted, but not evaluated")
            continue
        content, faults, digests = check_split(SegmentationDataset(samples, classes, table))
        contents[split] = content
        problems += unpaired + faults
        for path, digest in digests.items():
            other = first_with.setdefault(digest, path)
            if other != path:
                problems.append(f"{path}: same image as {other}; remove one, most of all if they are in two splits")
        if any(content["classes"].values()):
            notes += [f"{split}: no pixel of class {name}" for name, share in content["classes"].items() if not share]
        else:  # as in the test split of Cityscapes
            lines = problems if split in ("train", "val") else notes
            lines.append(f"{split}: no pixel has a label; it can be predicted, but not evaluated")
    for split, flag in (("train", "--split"), ("val", "--val-split")):
        if not splits and split not in contents:
            notes.append(f"no split {split}: set some images apart, or give train.py another with {flag}")
    return {"dataset": name, "splits": contents, "problems": problems, "notes": notes}


def existing_splits(name: str, root: Path) -> list[str]:
    """The splits in a dataset's folder."""
    pattern = {"cityscapes": "leftImg8bit/[!.]*", "camvid": "*annot", "folder": "images/[!.]*"}[name]
    return sorted(path.name.removesuffix("annot") for path in root.glob(pattern) if path.is_dir()) or ["train"]


def check_split(dataset: SegmentationDataset) -> tuple[dict, list[str], dict[Path, bytes]]:
    """What is in a split, {"images", "sizes", "unlabelled", "classes"}; its problems; and a digest of every image."""
    problems, unlabelled, digests, sizes, pixels = [], [], {}, Counter(), np.zeros(256, np.int64)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(read_sample, [dataset] * len(dataset), range(len(dataset)))
        for sample, result in zip(dataset.samples, results):
            if isinstance(result, DataError):
                problems.append(str(result))
                continue
            (width, height), counts, digests[sample.image] = result
            sizes[f"{width}x{height}"] += 1
            pixels += counts
            if not counts[:IGNORE].any():
                unlabelled.append(f"{sample.label}: no pixel has a label; label it, or remove it and its image")
            if min(width, height) < MIN_SIZE:
                problems.append(f"{sample.image}: {width}x{height} pixels, expected at least {MIN_SIZE}x{MIN_SIZE}")
    labelled = int(pixels[:IGNORE].sum())
    content = {
        "images": len(dataset),
        "sizes": dict(sizes.most_common()),  # {"WxH": images}
        "unlabelled": float(pixels[IGNORE] / max(1, pixels.sum())),  # share of all pixels; below, of the labelled ones
        "classes": {name: float(count / max(1, labelled)) for name, count in zip(dataset.classes.names, pixels)},
    }
    return content, problems + (unlabelled if labelled else []), digests


def read_sample(dataset: SegmentationDataset, index: int) -> tuple[tuple[int, int], np.ndarray, bytes] | DataError:
    """Width and height, (256,) pixels of each train id, and a digest of the image; or why it cannot be read."""
    try:
        image, label = dataset.read(index)
    except DataError as error:
        return error
    digest = hashlib.blake2b(b"%d" % image.width + image.tobytes(), digest_size=16).digest()
    return image.size, np.bincount(label.ravel(), minlength=256), digest


def sheet_rows(name: str, root: Path, split: str) -> Iterator[list[Image.Image]]:
    """Some images of a split, evenly spaced, without and with their labels in colour."""
    dataset = SegmentationDataset(find_samples(name, root, split)[0], *read_classes(name, root))
    for index in np.linspace(0, len(dataset) - 1, min(6, len(dataset))).astype(int):
        with contextlib.suppress(DataError):  # is in the report
            image, label = dataset.read(index)
            yield [image, Image.blend(image, dataset.classes.colour_map(label), 0.6)]


def print_report(report: dict) -> None:
    """Prints a report for people; problems that differ only in their files are one line."""
    splits = report["splits"]
    for split, content in splits.items():
        sizes = ", ".join(f"{count} of {size}" for size, count in list(content["sizes"].items())[:5])
        print(f"{split}: {content['images']} images with label maps: {sizes}{', ...' * (len(content['sizes']) > 5)}")
    print(f"{'share of the labelled pixels':<32}" + "".join(f"{split:>12}" for split in splits))
    for name in next(iter(splits.values()), {"classes": ()})["classes"]:
        print(f"  {name:<30}" + "".join(f"{content['classes'][name]:12.3%}" for content in splits.values()))
    print(f"{'unlabelled':<32}" + "".join(f"{content['unlabelled']:12.3%}" for content in splits.values()))
    for note in report["notes"]:
        print(f"note: {note}")
    kinds: dict[str, list[str]] = {}
    for problem in report["problems"]:
        kinds.setdefault(re.sub(r"\S*/\S*", "", problem.partition(": ")[2]), []).append(problem)
    for first, *others in kinds.values():
        print(f"problem: {first}{f' (and {len(others)} more like it)' if others else ''}")
    print(f"{len(report['problems']) or 'no'} problem{'s' * (len(report['problems']) != 1)}")


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of tools/check.py."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = parser.add_mutually_exclusive_group(required=True)
    folder.add_argument("root", metavar="ROOT", nargs="?", help="the dataset's folder")
    folder.add_argument("--data", metavar="ROOT", help="the same")
    parser.add_argument("--dataset", default="folder", help="folder, cityscapes or camvid (default: %(default)s)")
    parser.add_argument("--splits", nargs="+", default=[], metavar="SPLIT", help="splits to check (default: all)")
    parser.add_argument("--sheet", metavar="FILE", help="also write a picture of 6 images per split")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Checks as the command line says; the exit status."""
    args = get_args_parser().parse_args(argv)
    root, splits = Path(args.root or args.data), split_names("+".join(args.splits)) if args.splits else []
    report = check(args.dataset, root, splits)
    print_report(report)
    if args.sheet:
        rows = [row for split in report["splits"] for row in sheet_rows(args.dataset, root, split)]
        Path(args.sheet).parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(rows, ("image", "labels")).save(args.sheet)
        print(f"wrote {args.sheet}")
    print(json.dumps(report), flush=True)
    return 2 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(exit_status(main, (DataError,)))
