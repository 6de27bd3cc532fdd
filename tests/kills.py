"""Kills a training again and again, and compares where it ends with a run that nothing interrupted.

    python tests/kills.py --kills 50                     # one process
    python tests/kills.py --kills 20 --processes 2       # torchrun and its processes, all at once

Every step is followed by a checkpoint. Of the kills (SIGKILL), every second one waits until a checkpoint is being written, the
others come at a random moment, also before the first step. The last line is one JSON object; the status is 1 where anything
differs by a bit or a file is left over.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import streets  # noqa: E402
from model import read_checkpoint  # noqa: E402
from train import numbered_checkpoints  # noqa: E402

RUN = (
    "--epochs",
    6,
    "--batch-size",
    4,
    "--crop-size",
    64,
    96,
    "--val-every",
    3,
    "--log-every",
    2,
    "--amp",
    "off",
    "--ema",
    0.9,
)
RUN += ("--device", "cpu", "--workers", 1, "--save-minutes", 1e-6)


def command(root: Path, out: Path, *more, processes: int = 1) -> list[str]:
    """A short training on drawn scenes, 3 steps an epoch."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, str(ROOT / "train.py"), "--data", str(root), "--out", str(out), *map(str, (*RUN, *more))]


def start(argv: list[str], **options) -> subprocess.Popen:
    """The process, in a group of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(argv, env=environment, cwd=ROOT, start_new_session=True, text=True, **options)


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL for a process and all that came from it, and waits until none of them is left."""

    def children(pid: int) -> list[int]:
        with contextlib.suppress(OSError):
            own = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
            return own + [below for each in own for below in children(each)]
        return []

    everybody = [process.pid, *children(process.pid)]
    for pid in everybody:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in everybody):
        assert time.monotonic() < deadline, "a process outlives SIGKILL"
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def differences(a, b, place: str = "") -> list[str]:
    """Where two checkpoints are not the same to the bit; how they were started and where they lie apart."""
    if isinstance(a, dict) and isinstance(b, dict):
        own = {"args", "launches"} if not place else set()
        found = [f"{place}: keys {a.keys() ^ b.keys()}"] if a.keys() != b.keys() else []
        return found + [d for k in a.keys() & b.keys() - own for d in differences(a[k], b[k], f"{place}.{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{place}.{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        return [] if same else [place]
    return [] if a == b else [f"{place}: {a!r:.40} and {b!r:.40}"]


def records(out: Path) -> list[dict]:
    """What metrics.jsonl says, without the speed."""
    lines = (out / "logs/metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_s"} for line in lines]


def compare(whole: Path, out: Path) -> list[str]:
    """What tells a run from one without interruption, and files that should not be there."""
    found = []
    names = [[path.name for path in numbered_checkpoints(each / "checkpoints")] for each in (whole, out)]
    if names[0] != names[1]:
        return [f"checkpoints {names}"]
    for name in [names[0][-1], "best_model.pth"]:
        found += [f"{name}{d}" for d in differences(*(read_checkpoint(each / "checkpoints" / name) for each in (whole, out)))]
    if records(whole) != records(out):
        found.append("metrics.jsonl")
    expected = {path.relative_to(whole) for path in whole.rglob("*")}
    for path in out.rglob("*"):
        # The log of a start that was killed before its first checkpoint is moved aside, as that of any earlier run.
        moved = path.relative_to(out).parts[0] == "earlier" and (path.is_dir() or path.name in ("train.log", "metrics.jsonl"))
        if not moved and path.relative_to(out) not in expected:
            found.append(f"left over: {path}")
    return found


def survive(root: Path, folder: Path, kills: int, processes: int, seed: int) -> dict:
    """Trains once in peace and once with `kills` kills; what there is to say of it."""
    rng = random.Random(seed)
    subprocess.run(
        command(root, folder / "whole", processes=processes),
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, within_writing, attempts, finished = folder / "killed", 0, 0, 0
    checkpoints = out / "checkpoints"
    argv = command(root, out, "--resume", "auto", processes=processes)
    while attempts < kills:
        process = start(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        written = False
        if attempts % 2 == 0:  # once a step is done, when the n-th checkpoint from now is being written
            begun, wait_for = False, rng.randint(1, 3)
            while process.poll() is None:
                if not begun:
                    begun = "resumed" in (line := process.stdout.readline()) or "  step " in line
                    continue
                if any(checkpoints.glob(".*.tmp")):
                    wait_for -= 1
                    if not wait_for:
                        written = True
                        break
                    while any(checkpoints.glob(".*.tmp")) and process.poll() is None:
                        pass
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.5, 8) if processes == 1 else rng.uniform(2, 16))
        if process.poll() is not None:  # it was faster: begin with an empty folder again
            assert process.returncode == 0, f"status {process.returncode}"
            process.communicate()
            finished += 1
            if found := compare(folder / "whole", out):
                return {"kills": attempts, "differences": found}
            subprocess.run(["rm", "-r", str(out)], check=True)
            continue
        kill_all(process)
        attempts += 1
        within_writing += written and any(checkpoints.glob(".*.tmp"))
    subprocess.run(argv, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    found = compare(folder / "whole", out)
    return {
        "processes": processes, "kills": attempts, "within_writing": within_writing, "runs_finished": finished + 1,
        "differences": found,
    }  # fmt: skip


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
