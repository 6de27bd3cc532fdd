"""Kills a training again and again, and compares where it ends with a run that nothing interrupted.

    python tests/kills.py --kills 50                     # one process
    python tests/kills.py --kills 20 --processes 2       # torchrun and its processes, all at once

Each step is followed by a checkpoint. Each second kill (SIGKILL) waits for a checkpoint to be written, the others come
at a random moment, also before the first step. The last line is one JSON object; the status is 1 where anything
differs by a bit or a file is left over.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from model import read_checkpoint  # noqa: E402
from tools import streets  # noqa: E402
from train import saved_checkpoints  # noqa: E402

RUN = "--epochs 6 --batch-size 4 --crop-size 64 96 --val-every 3 --log-every 1 --amp off --ema 0.9 --workers 1"
RUN += " --device cpu --keep 1"  # which older epochs have a file is chance


def command(root: Path, out: Path, *more: str, launcher: str = "") -> list[str]:
    """A short training on drawn scenes, 3 steps an epoch, each with a checkpoint; `launcher`: torchrun's flags."""
    torchrun = ["-m", "torch.distributed.run", *launcher.split()] if launcher else []
    flags = ["--data", str(root), "--out", str(out), *RUN.split(), *more]
    return [sys.executable, *torchrun, str(ROOT / "tests/kills_train.py"), *flags]


def start(argv: list[str], **options) -> subprocess.Popen:
    """The process, in a group of its own; its output is text in a pipe."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options}
    # One thread: the same sums in the same order, however many processes. The other lets torchrun restart them.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(argv, env=environment, cwd=ROOT, start_new_session=True, **options)


def finish(argv: list[str]) -> None:
    """Runs it to its end, which must be a good one."""
    process = start(argv)
    output, _ = process.communicate()
    assert process.returncode == 0, output


def children(pid: int) -> list[int]:
    """All that came from a process, and from them; Linux alone."""
    with contextlib.suppress(OSError):
        own = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return own + [below for each in own for below in children(each)]
    return []


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL for a process and all that came from it; returns when the last of them has closed the pipe."""
    for pid in [process.pid, *children(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def differences(a, b, place: str = "") -> list[str]:
    """Where two checkpoints are not the same to the bit; the flags of their runs apart, and what is made of flags."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{place}: keys {a.keys() ^ b.keys()}"] if a.keys() != b.keys() else []
        common = a.keys() & b.keys() - {"args", "param_groups"}
        return found + [d for key in common for d in differences(a[key], b[key], f"{place}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{place}.{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        return [] if same else [place]
    return [] if a == b else [f"{place}: {a!r:.40} and {b!r:.40}"]


def records(out: Path) -> dict:
    """The last record of each step and of each validation in metrics.jsonl, without the speed."""
    lines = map(json.loads, (out / "logs/metrics.jsonl").read_text().splitlines())
    return {
        (each["kind"], each["epoch"], each.get("step")): {**each, "images_per_s": None, "seconds": None}
        for each in lines
    }


def compare(whole: Path, out: Path) -> list[str]:
    """What tells a run from one without interruption, and files that should not be there."""
    found = []
    names = [[path.name for path in saved_checkpoints(each / "checkpoints")] for each in (whole, out)]
    if names[0] != names[1]:
        return [f"checkpoints {names}"]
    for name in [names[0][-1], "best_model.pth"]:
        checkpoints = [read_checkpoint(each / "checkpoints" / name) for each in (whole, out)]
        found += [f"{name}{difference}" for difference in differences(*checkpoints)]
    if records(whole) != records(out):
        found.append("metrics.jsonl")
    expected = {path.relative_to(whole) for path in whole.rglob("*")}
    return found + [f"left over: {path}" for path in out.rglob("*") if path.relative_to(out) not in expected]


def wait_for_writing(process: subprocess.Popen, checkpoints: Path, times: int) -> bool:
    """Waits, after a step, until the n-th checkpoint from then on is being written; whether it came to that."""
    for line in process.stdout:
        if "  step " in line:
            break
    while process.poll() is None:
        if any(checkpoints.glob(".*.tmp")):
            times -= 1
            if not times:
                return True
            while any(checkpoints.glob(".*.tmp")) and process.poll() is None:
                pass
    return False


def survive(root: Path, folder: Path, kills: int, processes: int, seed: int) -> dict:
    """Trains once in peace, and again and again with `kills` kills in all; the counts, and what differs."""
    rng = random.Random(seed)
    launcher = f"--standalone --nproc_per_node={processes}" if processes > 1 else ""
    finish(command(root, folder / "whole", launcher=launcher))
    out = folder / "killed"
    argv = command(root, out, "--resume", "auto", launcher=launcher)
    result = {"processes": processes, "kills": 0, "within_writing": 0, "runs_finished": 0, "differences": []}
    while result["kills"] < kills:
        process = start(argv)
        if result["kills"] % 2 == 0:
            written = wait_for_writing(process, out / "checkpoints", rng.randint(1, 3))
        else:
            written = False
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.5, 8) * processes)
        if process.poll() is None:
            kill_all(process)
            result["kills"] += 1
            result["within_writing"] += written and any((out / "checkpoints").glob(".*.tmp"))
            continue
        output, _ = process.communicate()  # it was faster: compare, and begin with an empty folder
        assert process.returncode == 0, output
        result["runs_finished"] += 1
        result["differences"] += compare(folder / "whole", out)
        shutil.rmtree(out)
    finish(argv)
    result["runs_finished"] += 1
    result["differences"] += compare(folder / "whole", out)
    return result


def main() -> int:
    """Runs it as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="of the training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        streets.write_dataset(Path(folder) / "streets", {"train": 12, "val": 5}, 96, 192, seed=0, processes=2)
        result = survive(Path(folder) / "streets", Path(folder), args.kills, args.processes, args.seed)
    print(json.dumps(result))
    return 1 if result["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
