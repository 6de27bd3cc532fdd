"""ops_ext against plain PyTorch: time and memory of each operator.

    python tests/benchmarks/ops.py [--device cuda]

Plain PyTorch is taken contiguous and in channels_last, and the faster of the two is what ratios are to. Implementations
take turns, and the median of their times counts. Memory is what a fresh process needs beyond its inputs, at its peak.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ops_ext
from launch import exit_status, name_of

CLASSES, CROPS = 19, 4
Cases = dict[str, Callable[[], object]]


# ---------------------------------------------------------------------------------------------------------------- cases


def argmax_cases(size: tuple[int, int], smooth: bool, device: torch.device) -> Cases:
    """Scores at 1/8 to labels of one image; smooth ones have large areas of one class, as a street has."""
    h, w = size
    logits = torch.randn(1, CLASSES, h // 8, w // 8, generator=torch.Generator().manual_seed(0)).to(device)
    if smooth:
        logits = F.avg_pool2d(logits, 9, 1, 4)
    channels_last = logits.contiguous(memory_format=torch.channels_last)
    return {
        "plain": lambda: F.interpolate(logits, size, mode="bilinear").argmax(1),
        "plain, channels_last": lambda: F.interpolate(channels_last, size, mode="bilinear").argmax(1),
        "ops_ext": lambda: ops_ext.upsample_argmax(logits, size),
        "ops_ext, channels_last": lambda: ops_ext.upsample_argmax(channels_last, size),
    }


def loss_cases(size: tuple[int, int], device: torch.device) -> Cases:
    """Scores at 1/8 to the loss of four crops, half the image's sides, and its gradient."""
    h, w = (side // 2 for side in size)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(CROPS, CLASSES, h // 8, w // 8, generator=generator)
    target = torch.randint(0, CLASSES, (CROPS, h, w), dtype=torch.uint8, generator=generator)
    target[:, : h // 8] = 255
    target = target.to(device)
    contiguous = logits.to(device).requires_grad_()
    channels_last = logits.to(device, memory_format=torch.channels_last).requires_grad_()

    def plain(x: torch.Tensor) -> None:
        x.grad = None
        scores = F.interpolate(x, (h, w), mode="bilinear")
        F.cross_entropy(scores, target.long(), ignore_index=255).backward()

    def ours(x: torch.Tensor) -> None:
        x.grad = None
        ops_ext.upsample_cross_entropy(x, target).backward()

    return {
        "plain": lambda: plain(contiguous),
        "plain, channels_last": lambda: plain(channels_last),
        "ops_ext": lambda: ours(contiguous),
        "ops_ext, channels_last": lambda: ours(channels_last),
    }


# ------------------------------------------------------------------------------------------------------------ measuring


def median_ms(cases: Cases, device: torch.device, seconds: float) -> dict[str, float]:
    """Median time of one call of each, in milliseconds; they take turns, for `seconds` and at least five rounds."""
    inner = 1 if device.type == "cpu" else 20  # a GPU's clock is read from outside, between batches of calls
    times = {name: [] for name in cases}
    for case in (*cases.values(), *cases.values()):
        case()
    start, rounds = time.perf_counter(), 0
    while rounds < 5 or time.perf_counter() - start < seconds:
        rounds += 1
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


def peak_mib(make: Callable[..., Cases], size: tuple[int, int], name: str, device: torch.device) -> float:
    """Memory that one call needs beyond its inputs, in MiB: measured in a process that has done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "ops_ext"])
    with context.Pool(1) as pool:
        return pool.apply(_peak_mib_here, (make, size, name, device))


def _peak_mib_here(make: Callable[..., Cases], size: tuple[int, int], name: str, device: torch.device) -> float:
    make((64, 128), device=device)[name]()  # loads code and starts threads, on tensors too small to leave memory behind
    case = make(size, device=device)[name]
    if device.type != "cpu":
        before = torch.accelerator.memory_allocated()
        torch.accelerator.reset_peak_memory_stats()
        case()
        return (torch.accelerator.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status_kib("VmRSS")
    case()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))


def report(title: str, times: dict[str, float], memory: dict[str, float]) -> dict:
    plain = min(ms for name, ms in times.items() if name.startswith("plain"))
    print(f"\n{title}")
    for name, ms in times.items():
        ratio = "" if name.startswith("plain") else f"{plain / ms:8.1f} x"
        mib = f"{memory[name]:8.1f} MiB" if name in memory else ""
        print(f"  {name:28} {ms:10.3f} ms {mib:14} {ratio}", flush=True)
    return {"title": title, "ms": times, "mib": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(1024, 2048), metavar=("H", "W"), help="of an image, in pixels"
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="of measuring each operator's times")
    args = parser.parse_args()
    device, size = torch.device(args.device), tuple(args.size)
    print(
        f"{name_of(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{ops_ext.implementations(device)}"
    )
    results = []
    for title, make in (
        ("upsample_argmax, smooth scores", functools.partial(argmax_cases, smooth=True)),
        ("upsample_argmax, noise", functools.partial(argmax_cases, smooth=False)),
        (f"upsample_cross_entropy, forward and backward, {CROPS} crops of half the sides", loss_cases),
    ):
        memory = {name: peak_mib(make, size, name, device) for name in ("plain", "plain, channels_last", "ops_ext")}
        times = median_ms(make(size, device=device), device, args.seconds)
        results.append(report(f"{title}, {size[0]}x{size[1]}", times, memory))
    print(json.dumps({"device": name_of(device), "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    sys.exit(exit_status(main))
