"""Times inference, from an RGB image in memory to a label map in memory, or training.

    python tools/benchmark.py                                             # the paper's three sizes
    python tools/benchmark.py --size 512 1024 --against eager compile onnxruntime openvino-bf16
    python tools/benchmark.py --train 20 --data datasets/cityscapes --cache ram    # with the flags of train.py

Inference needs no weights. Training times the loader alone, the step alone and both, and writes nothing; under torchrun
it shares the batch out as train.py does. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch import AMP_DTYPES, OneLineParser, UsageError, exit_status, name_of, start_processes  # isort: skip

import numpy as np
import torch
from torch import Tensor, nn

import train
from data import MEAN, STD, DataError
from model import MIN_SIZE, CheckpointError, FastSCNN, load_weights
from ops_ext import accelerate, fast_precision

PAPER_SIZES = ((1024, 2048), (512, 1024), (256, 512))  # height and width in pixels, table 8
WARMUP = 3  # runs or steps before those that count

Segment = Callable[[Tensor], Tensor]  # from (N, H, W, 3) uint8 RGB to (N, H, W) uint8 labels


class ImagesToLabels(nn.Module):
    """The network in plain PyTorch, a Segment."""

    def __init__(self, model: FastSCNN):
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.register_buffer("shift", torch.tensor(MEAN).view(3, 1, 1) * 255)
        self.register_buffer("scale", 1 / (torch.tensor(STD).view(3, 1, 1) * 255))

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images.permute(0, 3, 1, 2).contiguous() - self.shift) * self.scale  # (N, 3, H, W)
        return self.model(pixels).argmax(1).to(torch.uint8)


def in_pytorch(model: FastSCNN, images: Tensor, device, *, compile_mode="", bf16=False) -> Segment:
    network = ImagesToLabels(model).to(device)
    if compile_mode:
        network = torch.compile(network, mode=compile_mode, dynamic=False)

    def segment(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return network(images.to(device))

    return segment


def in_onnxruntime(model: FastSCNN, images: Tensor, device) -> Segment:
    import onnxruntime

    network = ImagesToLabels(model).eval()
    program = torch.onnx.export(network, (images,), input_names=["images"], dynamo=True, verbose=False)
    content, options = program.model_proto.SerializeToString(), onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def in_openvino(model: FastSCNN, images: Tensor, device, *, precision="f32") -> Segment:
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    converted = openvino.convert_model(ImagesToLabels(model).eval(), example_input=images, input=list(images.shape))
    network = openvino.Core().compile_model(converted, "CPU", {"PERFORMANCE_HINT": "LATENCY", **hints})
    return lambda images: torch.from_numpy(network([images.numpy()])[0])


RUNTIMES = {  # each makes a Segment of a network, for images of one size
    "eager": in_pytorch,
    "compile": functools.partial(in_pytorch, compile_mode="default"),
    "max-autotune-bf16": functools.partial(in_pytorch, compile_mode="max-autotune", bf16=True),
    "onnxruntime": in_onnxruntime,
    "openvino": in_openvino,
    "openvino-bf16": functools.partial(in_openvino, precision="bf16"),
}


def latency_ms(segment: Segment, images: Tensor, repeats: int) -> dict[str, float]:
    """Median, 95th percentile and minimum of the time from images in memory to labels in memory."""
    times = []
    for _ in range(WARMUP + repeats):
        start = time.perf_counter()
        segment(images).cpu()  # the copy waits for the device
        times.append(1000 * (time.perf_counter() - start))
    figures = zip(("median", "p95", "min"), np.percentile(times[WARMUP:], (50, 95, 0)))
    return {name: round(float(ms), 3) for name, ms in figures}


def time_inference(args: argparse.Namespace) -> dict:
    """The latencies of all sizes; those of the first one also at the top level."""
    model = load_weights(args.weights) if args.weights else FastSCNN()
    device, _, _ = start_processes(args.device)
    precision = fast_precision(device) if args.amp == "auto" else AMP_DTYPES[args.amp] or torch.float32
    ours = accelerate(model, device=device, precision=precision)
    params = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("aux_"))
    results = []
    for height, width in [args.size] if args.size else PAPER_SIZES:
        images = torch.randint(0, 256, (args.batch_size, height, width, 3), dtype=torch.uint8)
        result = {"device": name_of(device), "precision": ours.precision, "size": [height, width]}
        result |= {"batch_size": args.batch_size, "latency_ms": latency_ms(ours, images, args.repeats)}
        result |= {"fps": round(1000 * args.batch_size / result["latency_ms"]["median"], 3), "params": params}
        if args.against:
            runtimes = {name: RUNTIMES[name](model, images, device) for name in args.against}
            result["against"] = {name: latency_ms(each, images, args.repeats) for name, each in runtimes.items()}
        for name, ms in {ours.precision: result["latency_ms"], **result.get("against", {})}.items():
            print(f"{height}x{width}, {name}: {ms['median']:.1f} ms, {1000 * args.batch_size / ms['median']:.1f} fps")
        results.append(result)
    return {**results[0], "sizes": results} if len(results) > 1 else results[0]


def batches(run: train.Run) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of all epochs."""
    for epoch in itertools.count(1):
        run.loader.batch_sampler.set_epoch(epoch)
        yield from run.loader


def images_per_s(run: train.Run, steps: int, work: Callable[[], object], skip: int = 0) -> float:
    """Of all processes, over `steps` calls of `work` after `skip` more, each of which is for one batch."""
    for _ in range(skip):
        work()
    start = time.perf_counter()
    for _ in range(steps):
        work()
    if run.device.type != "cpu":
        torch.accelerator.synchronize(run.device)
    return round(steps * run.args.batch_size / (time.perf_counter() - start), 2)


def time_training(steps: int, flags: list[str]) -> dict:
    """Images a second of the loader, of the step, and of both, for flags of train.py; empty for other ranks than 0."""
    args = train.parse_args(flags)
    datasets = train.open_datasets(args)
    device, rank, world_size = start_processes(args.device)
    if device.type == "cpu":
        train.keep_freed_memory()
    run = train.Run(args, datasets, device, rank, world_size)
    run.ddp.train()
    source, prefetched = batches(run), 2 * args.workers + 1
    images, target = next(source)
    result = {"device": name_of(device), "processes": world_size, "precision": args.amp, "cache": args.cache}
    result |= {"workers": args.workers, "batch_size": args.batch_size, "crop_size": args.crop_size, "steps": steps}
    result["loader_images_per_s"] = images_per_s(run, steps, lambda: next(source), prefetched)
    result["step_images_per_s"] = images_per_s(run, steps, lambda: train.train_step(run, images, target), WARMUP)
    for _ in range(prefetched):
        next(source)
    result["images_per_s"] = images_per_s(run, steps, lambda: train.train_step(run, *next(source)))
    if device.type != "cpu":
        result["peak_memory_mib"] = round(torch.accelerator.max_memory_allocated() / 2**20)
    return result if rank == 0 else {}


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of tools/benchmark.py."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", type=int, metavar="N", help="time N steps of training, with the flags of train.py instead of these")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="pixels (default: 1024x2048, 512x1024 and 256x512)")
    add("--batch-size", type=int, default=1, metavar="N", help="images at once (default: %(default)s)")
    add("--weights", metavar="FILE", help="time the network of this checkpoint (default: the paper's, untrained)")
    add("--amp", choices=("auto", *AMP_DTYPES), default="auto", help="precision (default: the fastest)")
    add("--device", help="cpu, cuda, ... (default: the machine's accelerator, else the CPU)")
    add("--against", nargs="+", choices=RUNTIMES, default=[], help="other runtimes to time on the same images")
    add("--repeats", type=int, default=20, metavar="N", help="timed runs (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Times what the command line says."""
    first = OneLineParser(add_help=False)
    first.add_argument("--train", type=int)
    chosen, flags = first.parse_known_args(argv)
    if chosen.train is not None:
        result = time_training(chosen.train, flags)
    else:
        args = get_args_parser().parse_args(flags)
        if args.size and min(args.size) < MIN_SIZE:
            raise UsageError(f"--size {args.size[0]} {args.size[1]}: expected at least {MIN_SIZE} pixels each")
        result = time_inference(args)
    if result:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    sys.exit(exit_status(main, (DataError, CheckpointError)))
