"""ops_ext against plain PyTorch: time and memory of each operator, and of a whole training step.

    python tests/benchmarks/ops.py --weights runs/streets/checkpoints/best_model.pth [--image STREET.png] [--device cuda]

Plain PyTorch is taken contiguous and in channels_last, and the faster of the two is what ratios are to. Implementations take
turns, and the median of their times counts. Memory is what a fresh process needs beyond its inputs, at its peak.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import streets  # noqa: E402

import ops_ext  # noqa: E402
import train  # noqa: E402
from data import normalise  # noqa: E402
from eval import exit_status  # noqa: E402
from model import FastSCNN, load_weights  # noqa: E402

SIZE, LOW = (1024, 2048), (128, 256)
CROPS, CROP, LOW_CROP = 4, (512, 1024), (64, 128)
CLASSES = 19
Cases = dict[str, Callable[[], object]]


# ------------------------------------------------------------------------------------------------------------ measuring


def median_ms(cases: Cases, device: torch.device, seconds: float = 6.0, least: int = 5) -> dict[str, float]:
    """Median time of one call of each, in milliseconds; they take turns, for `seconds` in all but `least` rounds."""
    inner = 1 if device.type == "cpu" else 20  # a GPU's clock is read from outside, between batches of calls
    times = {name: [] for name in cases}
    for case in cases.values():
        case()
        case()
    start = time.perf_counter()
    while len(times[name := next(iter(cases))]) < least or time.perf_counter() - start < seconds:
        for name, case in cases.items():
            synchronize(device)
            begin = time.perf_counter()
            for _ in range(inner):
                case()
            synchronize(device)
            times[name].append((time.perf_counter() - begin) / inner * 1e3)
    return {name: statistics.median(each) for name, each in times.items()}


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def peak_mib(make: Callable[[torch.device], Cases], name: str, device: torch.device) -> float:
    """Memory that one call needs beyond its inputs, in MiB: measured in a process that has done nothing else."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure_memory, args=(make, name, device, sender))
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"measuring the memory of {name} failed")
    return receiver.recv()


def _measure_memory(make: Callable[[torch.device], Cases], name: str, device: torch.device, sender) -> None:
    case = make(device, small=True)[name]  # loads code and starts threads, on tensors too small to leave memory behind
    case()
    case = make(device)[name]
    if device.type != "cpu":
        before = torch.accelerator.memory_allocated()
        torch.accelerator.reset_peak_memory_stats()
        case()
        sender.send((torch.accelerator.max_memory_allocated() - before) / 2**20)
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status_kib("VmRSS")
    case()
    sender.send((_status_kib("VmHWM") - before) / 1024)


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


# ---------------------------------------------------------------------------------------------------------------- cases


def argmax_cases(device: torch.device, logits: torch.Tensor | None = None, small: bool = False) -> Cases:
    low, size = ((4, 8), (32, 64)) if small else (LOW, SIZE)
    if logits is None:
        logits = torch.randn(1, CLASSES, *low, generator=torch.Generator().manual_seed(0))
    contiguous = logits.to(device).contiguous()
    channels_last = contiguous.contiguous(memory_format=torch.channels_last)
    return {
        "plain": lambda: F.interpolate(contiguous, size, mode="bilinear").argmax(1),
        "plain, channels_last": lambda: F.interpolate(channels_last, size, mode="bilinear").argmax(1),
        "ops_ext": lambda: ops_ext.upsample_argmax(contiguous, size),
        "ops_ext, channels_last": lambda: ops_ext.upsample_argmax(channels_last, size),
    }


def cross_entropy_cases(device: torch.device, small: bool = False) -> Cases:
    low, size = ((4, 8), (32, 64)) if small else (LOW_CROP, CROP)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(CROPS, CLASSES, *low, generator=generator)
    target = torch.randint(0, CLASSES, (CROPS, *size), dtype=torch.uint8, generator=generator)
    target[:, : size[0] // 8] = 255
    target = target.to(device)
    contiguous = logits.to(device).requires_grad_()
    channels_last = logits.to(device, memory_format=torch.channels_last).requires_grad_()

    def plain(x):
        x.grad = None
        scores = F.interpolate(x, size, mode="bilinear")
        F.cross_entropy(scores, target.long(), ignore_index=255).backward()

    def ours(x):
        x.grad = None
        ops_ext.upsample_cross_entropy(x, target).backward()

    return {
        "plain": lambda: plain(contiguous),
        "plain, channels_last": lambda: plain(channels_last),
        "ops_ext": lambda: ours(contiguous),
        "ops_ext, channels_last": lambda: ours(channels_last),
    }


def step_cases(device: torch.device, precision: torch.dtype | None) -> Cases:
    """A step of train.py: network with auxiliary heads, three losses, backward, SGD; with either kind of loss."""
    torch.manual_seed(0)
    model = FastSCNN(CLASSES, aux=True).train().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(train.parameter_groups(model, 4e-5), lr=1e-3, momentum=0.9)
    images = torch.randint(0, 256, (CROPS, *CROP, 3), dtype=torch.uint8).to(device)
    target = torch.randint(0, CLASSES, (CROPS, *CROP), dtype=torch.uint8).to(device)

    def step(loss_function):
        train.upsample_cross_entropy = loss_function
        with torch.autocast(device.type, precision, enabled=precision is not None):
            outputs = model(normalise(images), upsample=False)
        loss = train.Objective()(outputs, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return {
        "plain": lambda: step(ops_ext.upsample_cross_entropy_reference),
        "ops_ext": lambda: step(ops_ext.upsample_cross_entropy),
    }


def trained_logits(weights: str, image: str | None) -> torch.Tensor:
    """(1, C, 128, 256) scores that a trained network gives for a street of 1024x2048."""
    if image:
        picture = Image.open(image).convert("RGB").resize(SIZE[::-1])
    else:
        picture = streets.draw_scene(*SIZE, (0, 1, 0))[0].convert("RGB")
    model = load_weights(weights).eval()
    with torch.inference_mode():
        x = normalise(torch.from_numpy(np.array(picture))[None])
        return model(x.contiguous(memory_format=torch.channels_last), upsample=False).contiguous().clone()


# --------------------------------------------------------------------------------------------------------------- report


def report(title: str, times: dict[str, float], memory: dict[str, float] | None = None) -> dict:
    plain = min(ms for name, ms in times.items() if name.startswith("plain"))
    print(f"\n{title}")
    for name, ms in times.items():
        ratio = "" if name.startswith("plain") else f"{plain / ms:8.1f} x"
        mib = f"{memory[name]:8.1f} MiB" if memory and name in memory else ""
        print(f"  {name:28} {ms:10.3f} ms {mib:14} {ratio}", flush=True)
    return {"title": title, "ms": times, "mib": memory}


def print_floors(device: torch.device) -> None:
    """The least time that a GPU needs: what has to be read and written over its bandwidth, exponentials over their rate."""
    source = torch.empty(2**28, dtype=torch.float32, device=device)
    copy_ms = median_ms({"copy": lambda: source.clone()}, device, seconds=1)["copy"]
    bytes_per_ms = 2 * source.numel() * source.element_size() / copy_ms
    pixels, crops = SIZE[0] * SIZE[1], CROPS * CROP[0] * CROP[1]
    scores, crop_scores = CLASSES * LOW[0] * LOW[1] * 4, CROPS * CLASSES * LOW_CROP[0] * LOW_CROP[1] * 4
    properties = torch.cuda.get_device_properties(device)
    exps_per_ms = properties.multi_processor_count * 16 * properties.clock_rate  # special function units, kHz
    print(f"\nfloors at {bytes_per_ms / 1e9:.2f} TB/s (measured by a copy) and {exps_per_ms / 1e9:.2f} T exp/s")
    print(f"  upsample_argmax              {(scores + pixels) / bytes_per_ms:10.4f} ms, memory")
    print(f"  upsample_cross_entropy       {(2 * crop_scores + crops) / bytes_per_ms:10.4f} ms, memory")
    print(f"  upsample_cross_entropy       {crops * CLASSES / exps_per_ms:10.4f} ms, exponentials")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="checkpoint of a trained network, whose scores are labelled")
    parser.add_argument("--image", help="a street for it; a drawn one if not given")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    used = ops_ext.implementations(device)
    name = "CPU" if device.type == "cpu" else torch.cuda.get_device_name()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {used}")
    results = []
    if device.type == "cuda":
        print_floors(device)

    logits = trained_logits(args.weights, args.image)
    corners = logits.argmax(1)
    first = corners[:, :-1, :-1]
    others = (corners[:, 1:, :-1], corners[:, :-1, 1:], corners[:, 1:, 1:])
    mixed = torch.stack([first != other for other in others]).any(0).float().mean().item()
    title = f"upsample_argmax, {CLASSES} x 128x256 to 1024x2048"
    both = {"plain, channels_last", "ops_ext"}
    memory = {each: peak_mib(argmax_cases, each, device) for each in both}
    results.append(
        report(f"{title}, trained network ({mixed:.1%} of the cells mixed)", median_ms(argmax_cases(device, logits), device))
    )
    results.append(report(f"{title}, noise", median_ms(argmax_cases(device), device), memory))

    both = {"plain", "ops_ext"}
    memory = {each: peak_mib(cross_entropy_cases, each, device) for each in both}
    title = f"upsample_cross_entropy, forward and backward, {CROPS} x {CLASSES} x 64x128 to 512x1024"
    results.append(report(title, median_ms(cross_entropy_cases(device), device), memory))

    train.keep_freed_memory()  # as in training
    for precision in (None, torch.bfloat16):
        title = f"training step, {CROPS} x 512x1024, two auxiliary heads, {precision or torch.float32}"
        results.append(report(title, median_ms(step_cases(device, precision), device, seconds=20)))
    print(json.dumps({"device": name, "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    sys.exit(exit_status("ops.py", lambda: main()))
