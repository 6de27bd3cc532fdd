"""Writes a trained network for other runtimes, or its weights for another project.

    python tools/export.py --weights best_model.pth model.onnx         # needs pip install onnx onnxscript
    python tools/export.py --weights best_model.pth model.pt2          # torch.export.load("model.pt2").module()
    python tools/export.py --weights best_model.pth small.pth          # float16 weights, without auxiliary heads
    python tools/export.py --weights best_model.pth theirs.pth --as mmseg    # a network of --variant mmseg

An exported network takes RGB images, (N, H, W, 3) uint8 of any N and any H, W from 33 pixels, or, with --input
normalised, what model.py takes. It gives (N, H, W) uint8 labels, or (N, classes, H, W) float32 with --output logits.
The class names and the size of the training images are in the metadata of an .onnx, and in metadata.json of a .pt2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch import OneLineParser, UsageError, exit_status  # isort: skip

import torch
from torch import Tensor, nn

from data import MEAN, STD
from model import VARIANTS, CheckpointError, build_from_checkpoint, read_checkpoint, save_for_peer


class Deployed(nn.Module):
    """Network with its surroundings: (N, H, W, 3) uint8 RGB -> (N, H, W) uint8 labels or (N, classes, H, W) logits.

    Where `normalised`, the input is that of the network, (N, 3, H, W) float32.
    """

    def __init__(self, model: nn.Module, output: str, normalised: bool = False):
        super().__init__()
        self.model, self.output, self.normalised = model, output, normalised
        self.register_buffer("mean", torch.tensor(MEAN) * 255)
        self.register_buffer("std", torch.tensor(STD) * 255)

    def forward(self, images: Tensor) -> Tensor:
        if not self.normalised:  # float() comes first: some toolchains cannot transpose 8-bit tensors
            images = ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2)
        logits = self.model(images)
        return logits if self.output == "logits" else logits.argmax(1).to(torch.uint8)


def exported_program(network: Deployed, size: Sequence[int] | None = None) -> torch.export.ExportedProgram:
    """The network for one image of this height and width, or else for any batch, height and width."""
    height, width = size or (72, 136)
    batch = 1 if size else 2
    shape = (batch, 3, height, width) if network.normalised else (batch, height, width, 3)
    images = torch.zeros(shape, dtype=torch.float32 if network.normalised else torch.uint8)
    if size:
        return torch.export.export(network, (images,))
    # At 32 pixels the innermost feature map is a single pixel, which torch.export takes for a constant.
    first = 2 if network.normalised else 1
    dynamic = {first + i: torch.export.Dim(name, min=33, max=2**14) for i, name in enumerate(("height", "width"))}
    dynamic[0] = torch.export.Dim("batch", min=1, max=1024)
    return torch.export.export(network, (images,), dynamic_shapes={"images": dynamic})


def save_for_inference(checkpoint: dict, path: Path) -> None:
    """The checkpoint without auxiliary heads and what resuming needs, in float16, which all scripts read."""
    weights = {name: value for name, value in checkpoint["model"].items() if not name.startswith("aux_")}
    weights = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    kept = {name: checkpoint[name] for name in ("classes", "image_hw", "scale", "epoch") if name in checkpoint}
    torch.save({"model": weights, "model_args": {**checkpoint["model_args"], "aux": False}, **kept}, path)


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", type=Path, help="the file to write: .onnx, .pt2 (torch.export), or .pth (float16 weights)")
    add("--weights", required=True, metavar="FILE", help="checkpoint of train.py or of another project")
    add("--output", choices=("labels", "logits"), default="labels", help="of an exported network (default: labels)")
    add("--input", choices=("uint8", "normalised"), default="uint8", help="of an exported network (default: uint8)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="export for one image of this size (default: for any)")
    add("--as", dest="variant", choices=[name for name in VARIANTS if name != "paper"],
        help="write the weights under the names of this project; the network must be of this variant")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> None:
    """Exports as the command line says."""
    args = get_args_parser().parse_args(argv)
    if args.file.suffix not in ((".pth",) if args.variant else (".onnx", ".pt2", ".pth")):
        raise UsageError(f"{args.file} has the suffix {args.file.suffix!r}, expected .onnx, .pt2 or .pth; --as: .pth")
    if args.file.suffix == ".pth" and (args.output, args.input, args.size) != ("labels", "uint8", None):
        raise UsageError("a .pth file holds only weights: leave out --output, --input and --size")
    if args.file.suffix == ".onnx":
        import onnxscript  # noqa: F401 - rather now than after the work
    checkpoint = read_checkpoint(args.weights)
    model = build_from_checkpoint(checkpoint, args.weights).requires_grad_(False)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    result = {"file": str(args.file), "weights": args.weights, "variant": model.args["variant"]}
    if args.variant:
        if args.variant != result["variant"]:
            raise UsageError(f"{args.weights} is of variant {result['variant']}; train with --variant {args.variant}")
        save_for_peer(model, args.file, args.variant)
    elif args.file.suffix == ".pth":
        save_for_inference(checkpoint, args.file)
    else:
        network = Deployed(model, args.output, args.input == "normalised").eval()
        program = exported_program(network, args.size)
        metadata = {"classes": checkpoint.get("classes"), "image_hw": checkpoint.get("image_hw")}
        if args.file.suffix == ".pt2":
            torch.export.save(program, args.file, extra_files={"metadata.json": json.dumps(metadata)})
        else:
            names = {"input_names": ["images"], "output_names": [args.output]}
            onnx_program = torch.onnx.export(program, **names, verbose=False)
            onnx_program.model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
            onnx_program.save(args.file)
    print(f"wrote {args.file}")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(exit_status(main, (CheckpointError,)))
