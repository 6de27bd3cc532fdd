"""Fixtures of the test suite: the project on the import path, small drawn data, and the real data where it lies."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tools import streets  # noqa: E402

# On the tests' small tensors several threads gain nothing, and on a busy machine they wait for each other.
torch.set_num_threads(1)


def shared_data(name: str) -> Path:
    """A folder of real data; the test is skipped where it is absent."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"real data: {SHARED / name} is not on this machine")
    return SHARED / name


@pytest.fixture(autouse=True)
def signal_handlers():
    """What train.py installs ends with its test: processes that a later one forks would ignore SIGTERM."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def camvid() -> Path:
    return shared_data("camvid")


@pytest.fixture
def cityscapes_sample() -> Path:
    return shared_data("cityscapes_sample")


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    """Twelve drawn scenes to train on and five to validate on, 96x192 pixels, as Cityscapes."""
    root = tmp_path_factory.mktemp("drawn") / "streets"
    streets.write_dataset(root, {"train": 12, "val": 5}, 96, 192, seed=0, processes=2)
    return root


@pytest.fixture
def folder_dataset(tmp_path) -> Path:
    """Four images of 48x64 in three classes, left | middle | right, in the layout of one's own data."""
    root = tmp_path / "own"
    label = np.repeat(np.arange(3, dtype=np.uint8), [20, 20, 24])[None].repeat(48, 0)
    for split in ("train", "val"):
        for i in range(2):
            image = np.stack(
                [label * 100, 255 - label * 100, np.full_like(label, 40 * i + (20 if split == "val" else 0))], -1
            )
            for kind, array in (("images", image), ("labels", label)):
                path = root / kind / split / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    (root / "classes.json").write_text(json.dumps({"names": ["left", "middle", "right"]}))
    return root


def run_script(
    script: str, *args, processes: int = 1, timeout: int = 300, cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    """A script of the project in a process of its own, or in several under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # the same sums in the same order, however many processes
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=cwd)


def last_json(output: str) -> dict:
    """The JSON object on the last line of a program's output."""
    return json.loads(output.strip().splitlines()[-1])


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(folder: Path, function: Callable[..., int], *args, world_size: int = 2) -> tuple[list[int], str]:
    """The statuses of processes that each run `function`, and their output; much quicker to start than torchrun's.

    As under torchrun, one process that ends with an error ends the others.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    port = free_port()
    rest = (world_size, port, folder / "output.txt", function, args)
    processes = [context.Process(target=_run_rank, args=(rank, *rest)) for rank in range(world_size)]
    rest[2].unlink(missing_ok=True)
    for each in processes:
        each.start()
    deadline = time.monotonic() + 120
    while all(each.exitcode in (None, 0) for each in processes) and any(each.is_alive() for each in processes):
        assert time.monotonic() < deadline, rest[2].read_text()
        time.sleep(0.02)
    for each in processes:
        each.terminate()
        each.join(30)
    return [each.exitcode for each in processes], rest[2].read_text()


def _run_rank(rank: int, world_size: int, port: int, output: Path, function: Callable[..., int], args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    multiprocessing.set_start_method(None, force=True)  # for the loader's workers; a forkserver hands down its own
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(function(*args))
