"""What every script begins with: device, process group, exit status; and what depends on the kind of accelerator.

Scripts import it before other packages: where these are missing, and at Ctrl-C while they load, it prints one line.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # else threads spin at OpenMP's barriers, on a busy machine for long
try:
    import torch
    import torch.distributed as dist
    from torch import nn
except (KeyboardInterrupt, ModuleNotFoundError) as error:
    missing = isinstance(error, ModuleNotFoundError)
    print(f"{error}; bash run.sh installs what is needed" if missing else "interrupted", file=sys.stderr)
    sys.exit(2 if missing else 130)

if [int(number) for number in torch.__version__.split(".")[:2]] < [2, 11]:
    print(f"torch {torch.__version__} is too old, 2.11 is needed; bash run.sh installs it", file=sys.stderr)
    sys.exit(2)

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}  # --amp, for torch.autocast


class UsageError(ValueError):
    """Arguments that contradict each other or do not fit this machine; the message says which and what to change."""


class OneLineParser(argparse.ArgumentParser):
    """argparse that reports a wrong command line in one line, and takes no abbreviated flags."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise UsageError(f"{message}; --help lists all flags")


def exit_status(main: Callable[[], int | None], errors: tuple[type[Exception], ...] = ()) -> int:
    """Runs `main` and returns the exit status of the process: what `main` returned, or else 0.

    UsageError, OSError, a missing package, too little memory and the given `errors` are the user's to mend: one line on
    stderr and status 2. Other exceptions are faults of the program and keep their traceback.
    """
    try:
        status, line = main() or 0, ""
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        status, line = 130, "interrupted"
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        status, line = 2, f"this needs the package {package}: pip install {package}"
    except (UsageError, OSError, MemoryError, torch.OutOfMemoryError, *errors) as error:
        # An error from a DataLoader's worker has that worker's traceback as its message; its own is the last line.
        last_line = (str(error).strip() or repr(error)).splitlines()[-1]
        status, line = 2, last_line.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
    except Exception:
        status, line = 1, traceback.format_exc()
        if "is killed by signal: Bus error" in line:  # of a DataLoader's worker
            status, line = 2, "/dev/shm is too small for the loader; use --workers 0, or docker run --shm-size 8g"
    rank = os.environ.get("RANK", "0")
    if line:
        # Rank 0 reports what all processes meet, and a traceback may come of another's end: wait for torchrun.
        if rank != "0" or (status == 1 and dist.is_initialized()):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)
        script = os.path.basename(sys.argv[0]) + (f" [rank {rank}]" if rank != "0" else "")
        print(f"{script}: {line}", file=sys.stderr, flush=True)
    if dist.is_initialized():  # Gloo's threads may still be in a collective, and would abort a normal exit
        sys.stdout.flush()
        os._exit(status)
    return status


def available_cpus() -> int:
    """CPUs that this process may use, by its affinity and the quota of its cgroup."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no container, or "max"
        group = Path("/sys/fs/cgroup" + Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2])
        quota, period = map(int, (group / "cpu.max").read_text().split())
        cpus = min(cpus, max(1, round(quota / period)))
    return cpus


def start_processes(device_name: str | None = None, timeout_minutes: float = 30) -> tuple[torch.device, int, int]:
    """Device, rank and world size of this process, after it has joined the others that torchrun started.

    device_name is "cpu", "cuda:1", ..., or None for the machine's accelerator, or the CPU where there is none. Raises
    UsageError for a device that is not there, or fewer devices than processes.
    """
    torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device_name is not None:
        kind, _, index = device_name.partition(":")
        if kind not in ("cpu", device.type) or not (index.isdigit() or index == ""):
            raise UsageError(f"--device {device_name} is not available; this machine has {device.type}")
        if index and "RANK" in os.environ:
            raise UsageError(f"--device {device_name} puts all processes on one device; use --device {kind}")
        device = torch.device(device_name)
    if device.type != "cpu":
        index = device.index or int(os.environ.get("LOCAL_RANK", 0))
        if index >= torch.accelerator.device_count():
            raise UsageError(f"{device.type}:{index} does not exist; start one process per device, or use --device cpu")
        device = torch.device(device.type, index)
        torch.accelerator.set_device_index(index)
    if "RANK" not in os.environ:
        return device, 0, 1
    shared_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # keeps the addresses of earlier starts
    if shared_store and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise UsageError("--max-restarts needs --standalone or c10d, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 exported")
    dist.init_process_group(dist.get_default_backend_for_device(device), timeout=timedelta(minutes=timeout_minutes))
    return device, dist.get_rank(), dist.get_world_size()


def gathered(share: list, world_size: int) -> list:
    """The lists of all processes, joined in the order of their ranks; every process gets the same."""
    shares = [share] * world_size
    if world_size > 1:
        dist.all_gather_object(shares, share)
    return [item for each in shares for item in each]


def works(call: Callable[[], object]) -> bool:
    """Whether a device can do something, by trying: no error, and no warning as of falling back to the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            call()
        except (RuntimeError, Warning):
            return False
    return True


def memory_format(device: torch.device) -> torch.memory_format:
    """channels_last where the device has it, else contiguous (NPUs)."""
    try_it = partial(torch.empty, (1, 1, 1, 1), device=device, memory_format=torch.channels_last)
    return torch.channels_last if works(try_it) else torch.contiguous_format


def has_fused_sgd(device: torch.device) -> bool:
    """Whether the device has a fused SGD of its own; NPUs run it on the CPU."""
    parameter = nn.Parameter(torch.zeros(1, device=device))
    parameter.grad = torch.zeros_like(parameter)
    return works(lambda: torch.optim.SGD([parameter], fused=True).step())


def syncs_batch_norm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether SyncBatchNorm takes this dtype; that of NPUs takes no bfloat16. All processes call this together."""
    norm = nn.SyncBatchNorm(1).to(device)
    return works(lambda: norm(torch.zeros(2, 1, 1, 1, device=device, dtype=dtype)))


def name_of(device: torch.device) -> str:
    """The device's name as PyTorch knows it, else its type."""
    return getattr(torch.get_device_module(device), "get_device_name", lambda device: device.type)(device)
