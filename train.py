"""Trains Fast-SCNN.

    torchrun --nproc_per_node=8 train.py --data datasets/cityscapes      # 8 devices of this machine
    python train.py --dataset camvid --data datasets/camvid              # one process
    python train.py --resume auto                                        # go on from the newest checkpoint

The defaults are the Cityscapes recipe, and mean the same on 1, 2, 4 and 8 processes: --batch-size counts the images of all
processes together, and the learning rate follows it. Writes below --out: checkpoints/{epoch}.pth, which hold all that
resuming needs, checkpoints/best_model.pth, logs/train.log for people and logs/metrics.jsonl for programs.

The random numbers of an epoch depend on the seed, the epoch and the process alone, so a run that is interrupted after an
epoch and resumed goes on as if nothing had happened.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data import IGNORE, MEAN, STD, Augmentation, Classes, TrainBatches, normalise, open_dataset
from eval import AMP_DTYPES, OneLineParser, UsageError, evaluate, exit_status, metrics, start_processes, stop_processes
from model import VARIANTS, CheckpointError, FastSCNN, read_checkpoint
from ops_ext import accelerate, implementations, upsample_cross_entropy

PAPER_BATCH = 12  # images, for which --base-lr is given
POLY_POWER = 0.9
AUX_WEIGHT = 0.4  # of each auxiliary loss, section 4.1


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of train.py."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = argparse.BooleanOptionalAction

    data = parser.add_argument_group("data")
    data.add_argument("--dataset", default="cityscapes", help="cityscapes, camvid or folder (default: %(default)s)")
    data.add_argument("--data", metavar="ROOT", help="the dataset's folder (default: datasets/NAME)")
    data.add_argument("--split", default="train", help="split to train on, or several joined by + (default: %(default)s)")
    data.add_argument("--val-split", default="val", help="split to validate on (default: %(default)s)")
    data.add_argument(
        "--crop-size",
        type=int,
        nargs=2,
        default=[512, 1024],
        metavar=("H", "W"),
        help="training crop in pixels; larger is slower and, given time, better (default: 512 1024)",
    )
    data.add_argument(
        "--scale-range",
        type=float,
        nargs=2,
        default=[0.5, 2.0],
        metavar=("MIN", "MAX"),
        help="random resize factor before the crop (default: 0.5 2)",
    )
    data.add_argument(
        "--augment",
        action=switch,
        default=True,
        help="random resize, flip, brightness and channel noise; "
        "without, only the position of a crop smaller than the image is random",
    )
    data.add_argument(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="decoding processes per training process; 0 decodes between steps (default: %(default)s)",
    )

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=int, default=1000, metavar="N", help="passes over the data (default: %(default)s)")
    recipe.add_argument(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="images per step of all processes together; must divide by their number (default: %(default)s)",
    )
    recipe.add_argument(
        "--base-lr",
        type=float,
        default=0.045,
        metavar="LR",
        help=f"learning rate for {PAPER_BATCH} images; the rate used is LR x batch / {PAPER_BATCH} (default: %(default)s)",
    )
    recipe.add_argument(
        "--warmup-steps",
        type=int,
        default=200,
        metavar="N",
        help="steps of linear warm-up, at most a tenth of the run (default: %(default)s)",
    )
    recipe.add_argument("--momentum", type=float, default=0.9, metavar="M", help="of SGD (default: %(default)s)")
    recipe.add_argument(
        "--weight-decay",
        type=float,
        default=4e-5,
        metavar="W",
        help="of all but depthwise kernels, batch normalisation and biases (default: %(default)s)",
    )
    recipe.add_argument("--dropout", type=float, default=0.1, metavar="P", help="before the last layer (default: %(default)s)")
    recipe.add_argument("--aux", action=switch, default=True, help="the two auxiliary losses")
    recipe.add_argument(
        "--sync-bn", action=switch, default=True, help="batch normalisation over all processes (not on the CPU)"
    )
    recipe.add_argument("--freeze-bn", action="store_true", help="leave batch normalisation's statistics as they are")
    recipe.add_argument("--variant", choices=VARIANTS, default="paper", help="network variant (default: %(default)s)")
    recipe.add_argument("--seed", type=int, default=0, metavar="N", help="of all random numbers (default: %(default)s)")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cpu, cuda, ... (default: the machine's accelerator, or else the CPU)")
    machine.add_argument(
        "--amp",
        choices=("auto", *AMP_DTYPES),
        default="auto",
        help="mixed precision; auto takes bf16 where the hardware has it, else fp16 on accelerators",
    )
    machine.add_argument(
        "--loss-scale",
        default="dynamic",
        metavar="{dynamic,128,...}",
        help="for fp16: adapted to the gradients, or a fixed number (default: %(default)s)",
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        default="runs",
        metavar="DIR",
        help="folder for checkpoints and logs (default: %(default)s); "
        "an earlier run there is moved into DIR/earlier unless it is resumed",
    )
    output.add_argument("--resume", metavar="{auto,PATH}", help="go on from this checkpoint, or from the newest below DIR")
    output.add_argument("--keep", type=int, default=3, metavar="N", help="numbered checkpoints kept (default: %(default)s)")
    output.add_argument(
        "--val-every", type=int, default=10, metavar="N", help="epochs between validations (default: %(default)s)"
    )
    output.add_argument("--log-every", type=int, default=20, metavar="N", help="steps between log lines (default: %(default)s)")
    return parser


def check_args(args: argparse.Namespace, world_size: int) -> None:
    """Raises UsageError for values that cannot work, before anything is read or written."""
    if args.batch_size < 1 or args.batch_size % world_size:
        fitting = max(1, args.batch_size // world_size) * world_size
        raise UsageError(f"--batch-size {args.batch_size} does not divide over {world_size} processes; give e.g. {fitting}")
    for name in ("epochs", "val_every", "log_every", "keep"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    if min(args.crop_size) < 32:
        raise UsageError(f"--crop-size is {args.crop_size[0]} {args.crop_size[1]}, expected at least 32 pixels each")
    if not 0 < args.scale_range[0] <= args.scale_range[1]:
        raise UsageError(f"--scale-range is {args.scale_range[0]} {args.scale_range[1]}, expected 0 < MIN <= MAX")
    if args.loss_scale != "dynamic":
        try:
            valid = float(args.loss_scale) > 0
        except ValueError:
            valid = False
        if not valid:
            raise UsageError(f"--loss-scale is {args.loss_scale}, expected dynamic or a positive number such as 128")


# ------------------------------------------------------------------------------------------------------ schedule and loss


def learning_rate(step: int, total_steps: int, peak: float, warmup_steps: int) -> float:
    """Poly schedule (section 4.1) of the step-th of total_steps steps, counted from 0, times a linear warm-up."""
    warmup_steps = min(warmup_steps, total_steps // 10)
    warmup = min(1.0, (step + 1) / (warmup_steps + 1))
    return peak * warmup * (1 - step / total_steps) ** POLY_POWER


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Optimiser groups: weight decay on the kernels of convolutions, but on no depthwise kernel, batch norm or bias."""
    decayed = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    ids = {id(p) for p in decayed}
    others = [p for p in model.parameters() if id(p) not in ids]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def loss_sum(outputs: Tensor | tuple[Tensor, ...], target: Tensor) -> Tensor:
    """Cross-entropy summed over the pixels, of the main output and with AUX_WEIGHT of the auxiliary ones."""
    main, *aux = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = upsample_cross_entropy(main, target, ignore_index=IGNORE, reduction="sum")
    for output in aux:
        loss = loss + AUX_WEIGHT * upsample_cross_entropy(output, target, ignore_index=IGNORE, reduction="sum")
    return loss


def choose_amp(name: str, device: torch.device) -> str:
    """ "bf16", "fp16" or "off" for --amp; auto asks the hardware."""
    if name != "auto":
        return name
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "off"
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", lambda: False)
    return "bf16" if supported() else "fp16"


# -------------------------------------------------------------------------------------------------------------- one epoch


class Log:
    """Lines for people on stdout and in train.log, records for programs in metrics.jsonl; rank 0 alone writes."""

    def __init__(self, folder: Path, rank: int):
        self.rank = rank
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self.text = open(folder / "train.log", "a", encoding="utf-8")
            self.records = open(folder / "metrics.jsonl", "a", encoding="utf-8")

    def line(self, text: str) -> None:
        """One line for people."""
        if self.rank == 0:
            print(text, flush=True)
            print(text, file=self.text, flush=True)

    def record(self, **fields) -> None:
        """One JSON object for programs."""
        if self.rank == 0:
            print(json.dumps(fields), file=self.records, flush=True)

    def close(self) -> None:
        """Closes the files."""
        if self.rank == 0:
            self.text.close()
            self.records.close()


class Progress:
    """How far the run is, its speed and the time left, measured since this process began to train."""

    def __init__(self, first_step: int, total_steps: int, batch_size: int):
        self.first_step, self.total_steps, self.batch_size = first_step, total_steps, batch_size
        self.start = self.last_time = time.perf_counter()
        self.last_step = first_step

    def report(self, step: int) -> tuple[float, float]:
        """(images per second since the last report, seconds left for the whole run, validation counted in)."""
        now = time.perf_counter()
        rate = (step - self.last_step) * self.batch_size / max(now - self.last_time, 1e-9)
        left_s = (now - self.start) / (step - self.first_step) * (self.total_steps - step)
        self.last_step, self.last_time = step, now
        return rate, left_s

    def pause(self) -> None:
        """Leaves the time since the last report, spent on validation, out of the next rate."""
        self.last_time = time.perf_counter()


def train_one_epoch(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    args: argparse.Namespace,
    *,
    epoch: int,
    first_step: int,
    total_steps: int,
    device: torch.device,
    world_size: int,
    log: Log,
    progress: Progress,
) -> int:
    """One pass over the loader. Returns the number of steps done since the run began.

    Raises:
        UsageError: the loss is no finite number; found at the next log line, and before any checkpoint.
    """
    model.train()
    if args.freeze_bn:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    dtype = AMP_DTYPES[args.amp]
    step, steps_in_sum = first_step, 0
    running_loss = torch.zeros((), device=device)
    last_step = first_step + len(loader)
    for images, target in loader:
        lr = learning_rate(step, total_steps, args.lr, args.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images, target = images.to(device, non_blocking=True), target.to(device, non_blocking=True)
        # The mean is over the labelled pixels of all processes, whose gradients DDP averages: however many processes
        # share the batch, the loss is that of one.
        labelled = (target != IGNORE).sum()
        if world_size > 1:
            dist.all_reduce(labelled)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            outputs = model(normalise(images), upsample=False)
        loss = loss_sum(outputs, target) / labelled.clamp(min=1)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss * world_size).backward()
        scaler.step(optimizer)
        scaler.update(None if args.loss_scale == "dynamic" else float(args.loss_scale))
        running_loss += loss.detach()  # stays on the device: no step waits for the host
        step, steps_in_sum = step + 1, steps_in_sum + 1

        if step % args.log_every == 0 or step == last_step:
            mean_loss = running_loss / steps_in_sum
            if world_size > 1:
                dist.all_reduce(mean_loss)
            mean_loss = mean_loss.item()
            if not np.isfinite(mean_loss):
                raise UsageError(
                    f"loss is {mean_loss} within the last {steps_in_sum} steps before step {step} of epoch {epoch}; lower "
                    "--base-lr, or try --amp off; what was saved before is in --out and can be resumed"
                )
            rate, left_s = progress.report(step)
            log.line(
                f"epoch {epoch}/{args.epochs}  step {step}/{total_steps}  loss {mean_loss:.4f}  lr {lr:.5f}  "
                f"{rate:.1f} images/s  left {timedelta(seconds=round(left_s))}"
            )
            log.record(kind="train", epoch=epoch, step=step, loss=mean_loss, lr=lr, images_per_s=rate)
            running_loss.zero_()
            steps_in_sum = 0
    return step


# ------------------------------------------------------------------------------------------------------------ checkpoints


def save(checkpoint: dict, path: Path) -> None:
    """Writes beside `path` and renames, so that a file of this name is always whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        torch.save(checkpoint, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def numbered_checkpoints(folder: Path) -> list[Path]:
    """The {epoch}.pth files of a folder, oldest epoch first."""
    return sorted((p for p in folder.glob("*.pth") if p.stem.isdigit()), key=lambda p: int(p.stem))


def find_resume(args: argparse.Namespace) -> tuple[Path, dict] | None:
    """The checkpoint that --resume asks for and its path; None to begin anew.

    Raises:
        FileNotFoundError, CheckpointError: a path was given, and it is missing or cannot be resumed from.
    """
    if args.resume is None:
        return None
    path = Path(args.resume)
    if args.resume == "auto":
        found = numbered_checkpoints(Path(args.out) / "checkpoints")
        if not found:
            return None
        path = found[-1]
    checkpoint = read_checkpoint(path)
    missing = {"epoch", "step", "optimizer", "scaler", "best_miou", "args", "classes"} - checkpoint.keys()
    if missing:
        raise CheckpointError(
            f"{path}: holds no {', '.join(sorted(missing))}, so no training state; resume from a numbered one"
        )
    return path, checkpoint


def check_resume(path: Path, checkpoint: dict, model: FastSCNN, classes: Classes) -> None:
    """Raises CheckpointError where the checkpoint is of another network or other classes than this run."""
    differing = {k: (v, model.args.get(k)) for k, v in checkpoint["model_args"].items() if v != model.args.get(k)}
    if differing:
        text = ", ".join(f"{name} {was} (here {now})" for name, (was, now) in differing.items())
        raise CheckpointError(f"{path}: is of a network with {text}; resume with its own arguments, or begin anew")
    if checkpoint["classes"]["names"] != list(classes.names):
        raise CheckpointError(f"{path}: was trained on other classes; resume on its own dataset, or begin anew")


def set_earlier_run_aside(out: Path) -> Path | None:
    """Moves what an earlier run left in `out` to out/earlier/TIME, so that a new run destroys nothing."""
    left = [out / name for name in ("checkpoints", "logs") if (out / name).exists()]
    if not left:
        return None
    target = out / "earlier" / datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    target.mkdir(parents=True)
    for folder in left:
        folder.rename(target / folder.name)
    return target


# ------------------------------------------------------------------------------------------------------------------- main


def git_revision() -> str:
    """Commit of this code, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=10"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def keep_freed_memory() -> None:
    """Lets glibc keep the memory that a step frees, for the next step, instead of handing it back to the kernel.

    On the CPU each large tensor is otherwise mapped, zeroed page by page and unmapped again, a quarter of a step's time.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to do
        mallopt = ctypes.CDLL(None).mallopt
        m_mmap_max, m_trim_threshold = -4, -1  # from malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)  # never


def epoch_seed(*parts: int) -> int:
    """One seed out of several numbers, with no overlap between neighbours."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def main(argv: list[str] | None = None) -> None:
    """Trains as the command line says."""
    args = get_args_parser().parse_args(argv)
    args.data = args.data or f"datasets/{args.dataset}"
    check_args(args, int(os.environ.get("WORLD_SIZE", 1)))
    out = Path(args.out)

    # Data and the checkpoint to resume from are looked at before anything is written or any process waits for another.
    effects = {} if args.augment else {"scale_range": (1.0, 1.0), "flip": False, "brightness": 0.0, "channel_noise": 0.0}
    effects = {"scale_range": tuple(args.scale_range), **effects}
    augmentation = Augmentation(tuple(args.crop_size), seed=args.seed, **effects)
    train_set = open_dataset(args.dataset, args.data, args.split, augmentation)
    val_set = open_dataset(args.dataset, args.data, args.val_split)
    classes = train_set.classes
    torch.manual_seed(args.seed)
    model = FastSCNN(len(classes.names), variant=args.variant, aux=args.aux, dropout=args.dropout)
    resumed = find_resume(args)
    if resumed:
        check_resume(*resumed, model, classes)

    device, rank, world_size = start_processes(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    log = None
    try:
        if (
            args.batch_size == world_size
            and not args.freeze_bn
            and (device.type == "cpu" or not args.sync_bn or world_size == 1)
        ):
            raise UsageError(
                "one image per process leaves batch normalisation of the pyramid's 1x1 bin a single value; give "
                f"--batch-size {2 * world_size} or more"
            )
        if rank == 0:
            moved = None if resumed else set_earlier_run_aside(out)
            (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        log = Log(out / "logs", rank)
        if rank == 0 and moved:
            log.line(f"an earlier run was moved to {moved}")
        args.amp = choose_amp(args.amp, device)
        args.lr = args.base_lr * args.batch_size / PAPER_BATCH

        batches = TrainBatches(len(train_set), args.batch_size, seed=args.seed, rank=rank, world_size=world_size)
        loader = torch.utils.data.DataLoader(
            train_set,
            batch_sampler=batches,
            num_workers=args.workers,
            pin_memory=device.type != "cpu",
            persistent_workers=args.workers > 0,
        )
        total_steps = args.epochs * len(batches)

        model.to(device, memory_format=torch.channels_last)
        syncs_bn = world_size > 1 and args.sync_bn and device.type != "cpu"
        if syncs_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # before the DDP wrap
        optimizer = torch.optim.SGD(parameter_groups(model, args.weight_decay), lr=args.lr, momentum=args.momentum)
        static_scale = {} if args.loss_scale == "dynamic" else {"init_scale": float(args.loss_scale)}
        scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16", **static_scale)

        first_epoch, step, best_miou = 1, 0, -1.0
        if resumed:
            path, checkpoint = resumed
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            scaler.load_state_dict(checkpoint["scaler"])
            first_epoch, step, best_miou = checkpoint["epoch"] + 1, checkpoint["step"], checkpoint["best_miou"]
            changed = [
                f"{k} {v} -> {getattr(args, k, None)}" for k, v in checkpoint["args"].items() if getattr(args, k, None) != v
            ]
            changed = [text for text in changed if not text.startswith("resume ")]
            log.line(
                f"resumed {path} after epoch {checkpoint['epoch']}" + (f"; changed: {', '.join(changed)}" if changed else "")
            )
        elif args.resume:
            log.line(f"nothing to resume in {out / 'checkpoints'}: beginning anew")

        wrapped = model
        if world_size > 1:
            device_ids = None if device.type == "cpu" else [device.index]
            wrapped = nn.parallel.DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)

        parameters = sum(p.numel() for p in model.parameters())
        log.line(
            f"code {git_revision()}  torch {torch.__version__}  {' '.join(f'{k}={v}' for k, v in sorted(vars(args).items()))}"
        )
        log.line(
            f"device {device}  processes {world_size}  precision {args.amp}  parameters {parameters} with auxiliary heads\n"
            f"batch {args.batch_size} = {args.batch_size // world_size} x {world_size}  "
            f"learning rate {args.base_lr} x {args.batch_size} / {PAPER_BATCH} = {args.lr:.5f}\n"
            f"{len(train_set)} images to train, {len(val_set)} to validate  {len(batches)} steps x {args.epochs} epochs\n"
            f"ops {' '.join(f'{op}={which}' for op, which in implementations().items())}"
        )
        if world_size > 1 and not syncs_bn:
            why = "PyTorch has no SyncBatchNorm on the CPU" if args.sync_bn else "--no-sync-bn"
            log.line(f"{why}: each process normalises over its own {args.batch_size // world_size} images")
        if len(train_set) < args.batch_size:
            log.line(f"fewer images ({len(train_set)}) than the batch ({args.batch_size}): they are repeated within it")

        progress = Progress(step, total_steps, args.batch_size)
        for epoch in range(first_epoch, args.epochs + 1):
            torch.manual_seed(epoch_seed(args.seed, epoch, rank))
            batches.set_epoch(epoch)
            step = train_one_epoch(
                wrapped,
                loader,
                optimizer,
                scaler,
                args,
                epoch=epoch,
                first_step=step,
                total_steps=total_steps,
                device=device,
                world_size=world_size,
                log=log,
                progress=progress,
            )

            result = None
            if epoch % args.val_every == 0 or epoch == args.epochs:
                if world_size > 1 and not syncs_bn:
                    for buffer in model.buffers():  # each process has its own statistics: validate and save those of rank 0
                        dist.broadcast(buffer, 0)
                segment = accelerate(model, device=device, autocast=AMP_DTYPES[args.amp], mean=MEAN, std=STD)
                confusion = evaluate(segment, val_set, device=device, workers=args.workers, rank=rank, world_size=world_size)
                result = metrics(confusion, classes)
                miou = result["miou"]
                if miou is None:
                    raise UsageError(f"no pixel of split {args.val_split} has a label; check the label maps below {args.data}")
                log.line(
                    f"epoch {epoch}/{args.epochs}  mIoU {miou:.4f}  pixel accuracy {result['pixel_accuracy']:.4f}  best {max(best_miou, miou):.4f}"
                )
                log.record(kind="val", epoch=epoch, step=step, **result)
                progress.pause()
            if rank == 0:
                checkpoint = {
                    "model": model.state_dict(),
                    "model_args": model.args,
                    "classes": classes.to_dict(),
                    "epoch": epoch,
                    "miou": result and result["miou"],
                }
                if result and result["miou"] > best_miou:
                    best_miou = result["miou"]
                    save(checkpoint, out / "checkpoints" / "best_model.pth")
                checkpoint |= {
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "step": step,
                    "best_miou": best_miou,
                    "args": vars(args),
                }
                save(checkpoint, out / "checkpoints" / f"{epoch}.pth")
                for old in numbered_checkpoints(out / "checkpoints")[: -args.keep]:
                    old.unlink()
        log.line(f"done: best mIoU {best_miou:.4f}, {out / 'checkpoints' / 'best_model.pth'}")
    finally:
        if log is not None:
            log.close()
        stop_processes()


if __name__ == "__main__":
    sys.exit(exit_status("train.py", main))
