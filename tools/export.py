"""Writes a trained network for other runtimes, or its weights for another project.

    python tools/export.py --weights best_model.pth model.onnx         # needs pip install onnx onnxscript
    python tools/export.py --weights best_model.pth model.pt2          # torch.export.load("model.pt2").module()
    python tools/export.py --weights best_model.pth theirs.pth --as mmseg    # a network of --variant mmseg

An exported network takes RGB images, (N, H, W, 3) uint8 of any N and any H, W from 33 pixels, and gives (N, H, W) uint8
labels, or with --output logits (N, classes, H, W) float32. Its result is compared with PyTorch's at three sizes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import MEAN, STD
from launch import OneLineParser, UsageError, exit_status, import_option
from model import VARIANTS, CheckpointError, load_weights, save_for_peer


class Deployed(nn.Module):
    """Network with its surroundings: (N, H, W, 3) uint8 RGB -> (N, H, W) uint8 labels or (N, classes, H, W) logits."""

    def __init__(self, model: nn.Module, output: str):
        super().__init__()
        self.model, self.output = model, output
        self.register_buffer("mean", torch.tensor(MEAN) * 255)
        self.register_buffer("std", torch.tensor(STD) * 255)

    def forward(self, images: Tensor) -> Tensor:
        # float() comes first: some toolchains cannot transpose 8-bit tensors.
        logits = self.model(((images.float() - self.mean) / self.std).permute(0, 3, 1, 2))
        return logits if self.output == "logits" else logits.argmax(1).to(torch.uint8)


def exported_program(network: Deployed) -> torch.export.ExportedProgram:
    """The network for any batch, height and width."""
    # At 32 pixels the innermost feature map is a single pixel, which torch.export takes for a constant.
    height, width = (torch.export.Dim(name, min=33, max=2**14) for name in ("height", "width"))
    dynamic = {0: torch.export.Dim("batch", min=1, max=1024), 1: height, 2: width}
    images = torch.zeros(2, 72, 136, 3, dtype=torch.uint8)
    return torch.export.export(network, (images,), dynamic_shapes={"images": dynamic})


def write(program: torch.export.ExportedProgram, path: Path, output: str) -> None:
    """Writes .pt2 or .onnx; `output` is the name of the result in ONNX."""
    if path.suffix == ".pt2":
        torch.export.save(program, path)
    else:
        torch.onnx.export(program, input_names=["images"], output_names=[output], verbose=False).save(path)


def load(path: Path) -> Callable[[Tensor], Tensor]:
    """A written network as its runtime runs it. Raises UsageError where that is not installed."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    runtime = import_option("onnxruntime", "the comparison with PyTorch")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.inference_mode()
def agreement(run: Callable[[Tensor], Tensor], network: Deployed) -> float:
    """The least share, of three image sizes, of values in which an exported network agrees with PyTorch."""
    shares = []
    for shape in ((1, 64, 96), (2, 97, 131), (1, 256, 512)):
        images = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        close = torch.isclose(run(images).float(), network(images).float(), rtol=1e-3, atol=1e-3)
        shares.append(close.float().mean().item())
    return min(shares)


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", type=Path, help="the file to write: .onnx, .pt2 (torch.export), or .pth with --as")
    add("--weights", required=True, metavar="FILE", help="checkpoint of train.py or of another project")
    add("--output", choices=("labels", "logits"), default="labels", help="of an exported network (default: labels)")
    add("--as", dest="variant", choices=[name for name in VARIANTS if name != "paper"],
        help="write the weights under the names of this project; the network must be of this variant")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> None:
    """Exports as the command line says."""
    args = get_args_parser().parse_args(argv)
    if args.file.suffix not in ((".pth",) if args.variant else (".onnx", ".pt2")):
        raise UsageError(f"{args.file} has the suffix {args.file.suffix!r}, expected .onnx, .pt2, or .pth with --as")
    if args.file.suffix == ".onnx":
        for package in ("onnx", "onnxscript"):
            import_option(package, "export to ONNX")
    model = load_weights(args.weights).requires_grad_(False)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    result = {"file": str(args.file), "weights": args.weights, "variant": model.args["variant"]}
    if args.variant:
        if args.variant != result["variant"]:
            raise UsageError(f"{args.weights} is of variant {result['variant']}; train with --variant {args.variant}")
        save_for_peer(model, args.file, args.variant)
    else:
        network = Deployed(model, args.output).eval()
        write(exported_program(network), args.file, network.output)
        try:
            result["agreement"] = round(agreement(load(args.file), network), 6)
            print(f"agrees with PyTorch in {result['agreement']:.2%} of the values, at three sizes")
        except UsageError as error:
            print(f"not compared with PyTorch: {error}")
    print(f"wrote {args.file}")
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(exit_status(main, (CheckpointError,)))
