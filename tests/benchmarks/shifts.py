"""How networks bear another light and another scale than that of their training: a table of mIoU.

    python tests/benchmarks/shifts.py --dataset camvid --data datasets/camvid weights/camvid.pth OTHER.pth

Each network sees the images at its own scale, in float32; "scale x 0.75" is 0.75 times that.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from data import open_dataset
from eval import confusion_matrix, evaluate, evaluation_loader, metrics, resized
from model import load_weights, read_checkpoint
from ops_ext import accelerate

SHIFTS = {  # factors of red, green and blue, and of the scale
    "as they are": ((1, 1, 1), 1),
    "half as bright": ((0.5, 0.5, 0.5), 1),
    "blue cast": ((0.7, 0.9, 1.3), 1),
    "yellow cast": ((1.2, 1.1, 0.6), 1),
    "scale x 0.75": ((1, 1, 1), 0.75),
    "scale x 1.5": ((1, 1, 1), 1.5),
}


def recoloured(images: Tensor, factors: tuple[float, float, float]) -> Tensor:
    """(N, H, W, 3) uint8 RGB with each channel multiplied."""
    return (images * torch.tensor(factors)).round().clamp(max=255).to(torch.uint8)


def main() -> None:
    """Prints a row of Markdown for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="+")
    parser.add_argument("--dataset", default="camvid")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="val")
    args = parser.parse_args()
    dataset = open_dataset(args.dataset, args.data, args.split)
    loader, num_classes = evaluation_loader(dataset, 0), len(dataset.classes.names)
    print(f"| weights | {' | '.join(SHIFTS)} |\n|{'---|' * (len(SHIFTS) + 1)}")
    for path in args.weights:
        network, cells = accelerate(load_weights(path), precision=torch.float32), []
        scale = read_checkpoint(path).get("scale", 1.0)
        for factors, zoom in SHIFTS.values():
            segment, confusion = resized(network, scale * zoom), torch.zeros(num_classes, num_classes).long()
            shifted = evaluate(lambda images, s=segment, f=factors: s(recoloured(images, f)), loader)
            for _, _, label, prediction in shifted:
                confusion += confusion_matrix(prediction, label, num_classes)
            cells.append(f"{metrics(confusion, dataset.classes)['miou']:.4f}")
        print(f"| {path} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
