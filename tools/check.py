"""Checks a dataset before training: reads every image and label map, and reports what is in them and what is wrong.

    python tools/check.py ROOT                                        # an own dataset, layout "folder"
    python tools/check.py datasets/camvid --dataset camvid --sheet sheet.png

Prints sizes, and for each value in the label maps the class that it means and its share of the pixels; files without
partner, that cannot be read or occur twice (above all in two splits); values of no class, classes without a pixel. The
last line is one JSON object. Exit status 2 for problems.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch import OneLineParser, available_cpus, exit_status  # isort: skip

import numpy as np
from PIL import Image

from data import IGNORE, DataError, SegmentationDataset, find_samples, label_problem, read_classes, values_of
from eval import contact_sheet
from model import MIN_SIZE


def check(name: str, root: Path) -> dict:
    """Reads the splits train, val and test of a dataset. Raises DataError if there is no such dataset.

    Returns:
        {"dataset", "values": {class: its values in the label maps}, "splits": {split: see `check_split`},
        "problems": [...], "notes": [...]}.
    """
    classes, table = read_classes(name, root)
    values = {name: values_of(table, i) for i, name in enumerate(classes.names)}
    report = {"dataset": name, "values": values, "splits": {}, "problems": [], "notes": []}
    first_with: dict[bytes, Path] = {}  # the first image of every digest
    thumbnails: dict[str, dict[Path, np.ndarray]] = {}
    for split in ("train", "val", "test"):
        try:
            samples, unpaired = find_samples(name, root, split)
        except DataError as error:
            samples, unpaired = [], [str(error)]
        if not samples:
            report["problems"] += unpaired if split != "test" else []  # which may lack labels, or not exist
            continue
        dataset = SegmentationDataset(samples, classes, table)
        report["splits"][split], pixels, problems, digests, thumbnails[split] = check_split(dataset)
        for path, digest in digests.items():
            other = first_with.setdefault(digest, path)
            if other != path:
                problems.append(f"{path}: same image as {other}; remove one, most of all if they are in two splits")
        report["problems"] += unpaired + problems
        problem = label_problem(dataset, pixels, every_class=name == "folder" and split == "train")
        report["problems"] += [f"{split}: {problem}"] if problem and split != "test" else []
    if thumbnails.get("train") and thumbnails.get("val"):
        report["notes"] = neighbours(thumbnails["train"], thumbnails["val"])
    return report


def neighbours(train: dict[Path, np.ndarray], val: dict[Path, np.ndarray]) -> list[str]:
    """Signs that images of val are of the same recordings as images of train, by their looks and their names."""
    notes, advice = [], "val then says little about another place; split by recording"
    alike = np.stack([*val.values()]) @ np.stack([*train.values()]).T  # of different streets at most 0.9
    if count := int((alike.max(1) > 0.95).sum()):
        first, second = np.unravel_index(alike.argmax(), alike.shape)
        pair = f"{[*val][first]} like {[*train][second]}"
        notes.append(f"{count} of {len(val)} images of val look like neighbours of images of train, {pair}: {advice}")
    recordings = [{re.sub(r"\d*$", "", path.stem) for path in split} for split in (train, val)]
    if shared := sorted(recordings[0] & recordings[1] - {""}):
        notes.append(f"train and val both have images named {shared[0]}*, if of one recording: {advice}")
    return notes


def check_split(
    dataset: SegmentationDataset,
) -> tuple[dict, np.ndarray, list[str], dict[Path, bytes], dict[Path, np.ndarray]]:
    """Reads all images and label maps of a split.

    Returns:
        {"images", "sizes": {"WxH": images}, "unlabelled": share of the pixels, "classes": {name: share of the labelled
        pixels}}; (256,) pixels of each train id; the problems; a digest and a thumbnail of every image.
    """
    with ThreadPoolExecutor(available_cpus()) as pool:
        results = list(pool.map(read_sample, [dataset] * len(dataset), range(len(dataset))))
    problems = [str(result) for result in results if isinstance(result, DataError)]
    seen = [(s, *result) for s, result in zip(dataset.samples, results) if not isinstance(result, DataError)]
    pixels = sum((counts for _, _, counts, *_ in seen), np.zeros(256, np.int64))
    labelled = int(pixels[:IGNORE].sum())
    for sample, (width, height), counts, *_ in seen:
        if labelled and not counts[:IGNORE].any():
            problems.append(f"{sample.label}: no pixel has a label; label it, or remove it and its image")
        if min(width, height) < MIN_SIZE:
            problems.append(f"{sample.image}: {width}x{height} pixels, expected at least {MIN_SIZE}x{MIN_SIZE}")
    content = {
        "images": len(dataset),
        "sizes": dict(Counter(f"{width}x{height}" for _, (width, height), *_ in seen).most_common()),
        "unlabelled": float(pixels[IGNORE] / max(1, pixels.sum())),
        "classes": {name: float(count / max(1, labelled)) for name, count in zip(dataset.classes.names, pixels)},
    }
    digests, thumbnails = ({sample.image: rest[i] for sample, *rest in seen} for i in (2, 3))
    return content, pixels, problems, digests, thumbnails


def read_sample(dataset: SegmentationDataset, index: int) -> tuple | DataError:
    """Width and height, (256,) pixels of each train id, a digest and a thumbnail; or why the sample cannot be read.

    The thumbnail: (384,) grey values with a mean of 0 and a length of 1, so that products are correlations.
    """
    try:
        image, label = dataset.read(index)
    except DataError as error:
        return error
    digest = hashlib.blake2b(b"%d" % image.width + image.tobytes(), digest_size=16).digest()
    grey = np.asarray(image.convert("L").resize((24, 16), Image.Resampling.BOX), float).ravel()
    grey -= grey.mean()
    return image.size, np.bincount(label.ravel(), minlength=256), digest, grey / max(1e-6, np.linalg.norm(grey))


def sheet_rows(name: str, root: Path, split: str) -> Iterator[list[Image.Image]]:
    """Some images of a split, evenly spaced, without and with their labels in colour."""
    dataset = SegmentationDataset(find_samples(name, root, split)[0], *read_classes(name, root))
    for index in np.linspace(0, len(dataset) - 1, min(6, len(dataset))).astype(int):
        image, label = dataset.read(index)
        yield [image, Image.blend(image, dataset.classes.colour_map(label), 0.6)]


def print_report(report: dict) -> None:
    """Prints a report for people; problems that differ only in their files and numbers of pixels are one line."""
    splits = report["splits"]
    for split, content in splits.items():
        sizes = ", ".join(f"{count} of {size}" for size, count in list(content["sizes"].items())[:5])
        print(f"{split}: {content['images']} images with label maps: {sizes}{', ...' * (len(content['sizes']) > 5)}")
    if splits:
        columns = "".join(f"{split:>12}" for split in splits)
        print(f"{'value':<16}{'name':<24}{columns}  (share of labelled pixels)")
        for name, values in report["values"].items():
            shares = (f"{content['classes'][name]:12.3%}" for content in splits.values())
            print(f"{str(values)[1:-1]:<15.15} {name:<24}" + "".join(shares))
        print(f"{'unlabelled, of all pixels':<40}" + "".join(f"{each['unlabelled']:12.3%}" for each in splits.values()))
    kinds: dict[str, list[str]] = {}
    for problem in report["problems"]:
        kind = re.sub(r"\S*/\S*|\d+ values on \S+|in \d+ pixels", "", problem.partition(": ")[2])
        kinds.setdefault(kind, []).append(problem)
    for first, *others in kinds.values():
        print(f"problem: {first}{f' (and {len(others)} more like it)' if others else ''}")
    for note in report["notes"]:
        print(f"note: {note}")
    print(f"{len(report['problems']) or 'no'} problem{'s' * (len(report['problems']) != 1)}")


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of tools/check.py."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", metavar="ROOT", type=Path, help="the dataset's folder")
    parser.add_argument("--dataset", default="folder", help="folder, cityscapes or camvid (default: %(default)s)")
    parser.add_argument("--sheet", metavar="FILE", help="without problems, also write a picture of 6 images per split")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Checks as the command line says; the exit status."""
    args = get_args_parser().parse_args(argv)
    report = check(args.dataset, args.root)
    print_report(report)
    if args.sheet and not report["problems"]:
        rows = [row for split in report["splits"] for row in sheet_rows(args.dataset, args.root, split)]
        Path(args.sheet).parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(rows, ("image", "labels")).save(args.sheet)
    print(json.dumps(report), flush=True)
    return 2 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(exit_status(main, (DataError,)))
