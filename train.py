"""Trains Fast-SCNN.

    torchrun --nproc_per_node=8 train.py --data datasets/cityscapes      # 8 devices of this machine
    python train.py --dataset camvid --data datasets/camvid              # one process
    python train.py --resume auto                                        # go on from the newest checkpoint

The defaults are the Cityscapes recipe, and mean the same on 1, 2, 4 and 8 processes: --batch-size counts the images of all
processes together, and the learning rate follows it. Writes below --out: checkpoints/{epoch}.pth, which hold all that
resuming needs, checkpoints/best_model.pth, logs/train.log for people and logs/metrics.jsonl for programs, and at the end report.html,
a page with curves and figures.

The random numbers of a step depend on the seed, the step and the process alone, so a run that is interrupted anywhere and resumed
goes on as if nothing had happened. SIGTERM and Ctrl-C end the step, save, and leave with status 75; a second one leaves at once.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import errno
import fcntl
import functools
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data import (
    IGNORE,
    MEAN,
    STD,
    Augmentation,
    Classes,
    DeviceCache,
    RamCache,
    SegmentationDataset,
    TrainBatches,
    cache_bytes,
    free_memory,
    normalise,
    open_dataset,
    read_label,
    size_text,
)
from eval import (
    AMP_DTYPES,
    OneLineParser,
    UsageError,
    check_bounds,
    evaluate,
    exit_status,
    gathered,
    git_revision,
    import_option,
    metrics,
    outlive_signals,
    report_title,
    start_processes,
    write_report,
)
from model import VARIANTS, CheckpointError, FastSCNN, build_from_checkpoint, read_checkpoint
from ops_ext import accelerate, implementations, upsample_cross_entropy

PAPER_BATCH = 12  # images, for which --base-lr is given
POLY_POWER = 0.9
AUX_WEIGHT = 0.4  # of each auxiliary loss, section 4.1
STOPPED = 75  # exit status after a signal, when all is saved: EX_TEMPFAIL, try again

# What --recipe sets, by data set; flags given beside it win. "paper" is section 4.1. "best" is for CamVid, and small data of one's
# own, what tests/benchmarks/recipes.py measured on CamVid's validation split. Cityscapes could not be measured here: there it is what
# others have measured, MMSegmentation's batch, rate, crops and photometric distortion, and an average of the weights.
_PAPER = {
    "batch_size": 12, "base_lr": 0.045, "epochs": 1000, "scale_range": [0.5, 2.0], "schedule": "poly", "optimizer": "sgd",
    "momentum": 0.9, "weight_decay": 4e-5, "aux_weight": AUX_WEIGHT, "dropout": 0.1,
}  # fmt: skip
_SMALL = {
    "batch_size": 4, "base_lr": 0.27, "epochs": 1000, "scale_range": [0.75, 1.75], "class_balance": 0.5,
    "class_balance_end": 0.125, "ema": 0.99, "dropout": 0.0, "half_resolution": 0.6,
}  # fmt: skip
_LARGE = {
    "batch_size": 32, "base_lr": 0.045, "epochs": 1000, "scale_range": [0.5, 2.0], "max_class_share": 0.75, "ema": 0.999,
    "brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 18.0,
}  # fmt: skip
_CAMVID_SIZE = {"crop_size": [360, 480]}
RECIPES = {
    "paper": {"cityscapes": _PAPER, "camvid": {**_PAPER, **_CAMVID_SIZE}, "folder": _PAPER},
    "best": {"cityscapes": _LARGE, "camvid": {**_SMALL, **_CAMVID_SIZE}, "folder": _SMALL},
}

# What flags may be, both ends included: what is beyond is a slip, and would go on for ever or end in an error far from here.
BOUNDS = {
    "epochs val_every log_every keep save_every max_skipped benchmark": (1, 10**6),
    "batch_size": (1, 2**16),
    "warmup_steps": (0, 10**9),
    "workers": (0, 512),
    "seed": (0, 2**63 - 1),
    "base_lr": (0, 1e30),
    "aux_weight teacher_weight weight_decay": (0, 1000),
    "class_balance class_balance_end": (0, 10),
    "hue": (0, 180),
    "save_minutes": (0, 10**6),
    "peer_timeout": (0.1, 10**4),
    "brightness channel_noise contrast saturation label_smoothing half_resolution max_class_share": (0, 1),
    "dropout ohem ema momentum": (0, 1),
}


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of train.py."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = argparse.BooleanOptionalAction
    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="cityscapes", help="cityscapes, camvid or folder (default: %(default)s)")
    add("--data", metavar="ROOT", help="the dataset's folder (default: datasets/NAME)")
    add("--split", default="train", help="split to train on, or several joined by + (default: %(default)s)")
    add("--val-split", default="val", help="split to validate on (default: %(default)s)")
    add("--crop-size", type=int, nargs=2, default=[512, 1024], metavar=("H", "W"),
        help="training crop in pixels; larger is slower and, given time, better (default: 512 1024)")
    add("--scale-range", type=float, nargs=2, default=[0.5, 2.0], metavar=("MIN", "MAX"),
        help="random resize factor before the crop; narrow it for short runs (default: 0.5 2)")
    add("--augment", action=switch, default=True,
        help="resize, flip and recolour at random, as the flags below say; without, only the position of a crop is random")
    add("--brightness", type=float, default=0.3, metavar="B", help="factor 1 - B to 1 + B on the image (default: %(default)s)")
    add("--channel-noise", type=float, default=0.1, metavar="B", help="the same on each colour channel (default: %(default)s)")
    add("--contrast", type=float, default=0.0, metavar="B", help="the same on the distance to medium grey (default: %(default)s)")
    add("--saturation", type=float, default=0.0, metavar="B",
        help="the same on the distance to the grey of equal luma (default: %(default)s)")
    add("--hue", type=float, default=0.0, metavar="DEGREES", help="turn of the colours, at most (default: %(default)s)")
    add("--max-class-share", type=float, default=1.0, metavar="SHARE",
        help="draw a crop anew, up to 10 times, whose most frequent class fills more than this of it (default: %(default)s, never)")
    add("--half-resolution", type=float, default=0.0, metavar="SHARE",
        help="share of the epochs, the first ones, with crops and images of half the size, four times as fast (default: %(default)s)")
    add("--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N",
        help="decoding processes per training process; 0 decodes between steps (default: %(default)s)")
    add("--cache", choices=("none", "ram", "device"), default="none",
        help="keep all images decoded, 4 bytes a pixel: in memory that the processes of a machine share, or on the device, "
        "which then augments them too and needs no workers (default: %(default)s)")

    add = parser.add_argument_group("recipe").add_argument
    add("--recipe", choices=RECIPES,
        help="set batch, rate, augmentation and the rest as in the paper (batch 12), or as is best for the data set; flags given beside "
        "it win")
    add("--epochs", type=int, default=1000, metavar="N", help="passes over the data (default: %(default)s)")
    add("--batch-size", type=int, default=16, metavar="N",
        help="images per step of all processes together, whose number must divide it (default: %(default)s)")
    add("--base-lr", type=float, default=0.045, metavar="LR",
        help=f"learning rate for {PAPER_BATCH} images; used is LR x batch / {PAPER_BATCH} (default: %(default)s)")
    add("--warmup-steps", type=int, default=200, metavar="N",
        help="steps of linear warm-up, at most a tenth of the run (default: %(default)s)")
    add("--schedule", choices=("poly", "cosine"), default="poly",
        help=f"how the rate falls to 0: with the power {POLY_POWER} as in the paper, or as half a cosine (default: %(default)s)")
    add("--optimizer", choices=("sgd", "adamw"), default="sgd",
        help="adamw wants a --base-lr some 15 times lower and a --weight-decay of 0.01 or more (default: %(default)s)")
    add("--momentum", type=float, default=0.9, metavar="M", help="of SGD, or AdamW's first beta (default: %(default)s)")
    add("--weight-decay", type=float, default=4e-5, metavar="W",
        help="of all but depthwise kernels, batch normalisation and biases (default: %(default)s)")
    add("--dropout", type=float, default=0.1, metavar="P", help="before the last layer (default: %(default)s)")
    add("--aux", action=switch, default=True, help="the two auxiliary losses")
    add("--aux-weight", type=float, default=AUX_WEIGHT, metavar="W", help="of each of them (default: %(default)s)")
    add("--label-smoothing", type=float, default=0.0, metavar="SHARE",
        help="share of the target that is spread over all classes (default: %(default)s)")
    add("--class-balance", type=float, default=0.0, metavar="POWER",
        help="weight classes by their share of the training pixels to the power of -POWER; 0 for all alike, 0.5 where rare classes "
        "matter (default: %(default)s)")
    add("--class-balance-end", type=float, metavar="POWER",
        help="power in the last epoch, towards which it moves evenly: 0 finds rare classes early and weighs errors as they are "
        "counted late (default: that of --class-balance)")
    add("--ohem", type=float, default=0.0, metavar="P",
        help="main loss over hard pixels alone, whose true class gets less than this probability, at least a sixteenth of all of a "
        "process; 0 for all pixels, usual are 0.3 to 0.7 (default: %(default)s)")
    add("--ema", type=float, default=0.0, metavar="DECAY",
        help="validate and save a moving average of the weights; 0 for the weights themselves, usual are 0.99 for runs of a few "
        "thousand steps and 0.999 for long ones (default: %(default)s)")
    add("--teacher", metavar="FILE", help="learn from the class probabilities of these trained weights too")
    add("--teacher-weight", type=float, default=1.0, metavar="W", help="of that part of the loss (default: %(default)s)")
    add("--sync-bn", action=switch, default=True, help="batch normalisation over all processes (not on the CPU)")
    add("--freeze-bn", action="store_true", help="leave batch normalisation's statistics as they are")
    add("--variant", choices=VARIANTS, default="paper", help="network variant (default: %(default)s)")
    add("--init-weights", metavar="FILE",
        help="begin with these weights, of this project or another's (see eval.py), the last layers anew where the classes are others")
    add("--seed", type=int, default=0, metavar="N", help="of all random numbers (default: %(default)s)")

    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cpu, cuda, ... (default: the machine's accelerator, or else the CPU)")
    add("--amp", choices=("auto", *AMP_DTYPES), default="auto",
        help="mixed precision; auto takes bf16 where the hardware has it, else fp16 on accelerators")
    add("--loss-scale", default="dynamic", metavar="{dynamic,128,...}",
        help="for fp16: adapted to the gradients, or a fixed number (default: %(default)s)")
    add("--peer-timeout", type=float, default=15, metavar="MINUTES",
        help="how long to wait for another process that does not answer; longer than rank 0 takes to decode a cache (default: %(default)s)")
    add("--benchmark", type=int, metavar="N",
        help="train nothing: time N steps of the loader alone, of the training alone and of both, and write nothing")

    add = parser.add_argument_group("output").add_argument
    add("--out", default="runs", metavar="DIR",
        help="folder of checkpoints and logs; an earlier run in it is moved to DIR/earlier unless resumed (default: %(default)s)")
    add("--resume", metavar="{auto,PATH}", help="go on from this checkpoint, or from the newest of --out")
    add("--keep", type=int, default=3, metavar="N", help="numbered checkpoints kept (default: %(default)s)")
    add("--save-every", type=int, default=1, metavar="N",
        help="epochs between checkpoints; epochs that are validated are saved in any case (default: %(default)s)")
    add("--save-minutes", type=float, default=10, metavar="MINUTES",
        help="also save within an epoch, so often; 0 for never (default: %(default)s)")
    add("--max-skipped", type=int, default=25, metavar="N",
        help="steps without a finite loss and gradient are skipped; so many in a row end the run (default: %(default)s)")
    add("--val-every", type=int, default=10, metavar="N", help="epochs between validations (default: %(default)s)")
    add("--tensorboard", action="store_true", help="also write the figures to DIR/logs for TensorBoard, a package of its own")
    add("--log-every", type=int, default=20, metavar="N", help="steps between log lines (default: %(default)s)")
    # fmt: on
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the defaults of its --recipe.

    Raises:
        UsageError: a flag or a value that there is not.
    """
    parser = get_args_parser()
    chosen = parser.parse_args(argv)
    if chosen.recipe:
        if chosen.dataset not in RECIPES[chosen.recipe]:
            raise UsageError(f"--recipe {chosen.recipe} is for {', '.join(RECIPES[chosen.recipe])}, not for {chosen.dataset}")
        parser.set_defaults(**RECIPES[chosen.recipe][chosen.dataset])
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace, world_size: int) -> None:
    """Raises UsageError for values that cannot work, before anything is read or written."""
    check_bounds(args, BOUNDS)
    if args.batch_size % world_size:
        fitting = max(1, args.batch_size // world_size) * world_size
        raise UsageError(f"--batch-size {args.batch_size} does not divide over {world_size} processes; give e.g. {fitting}")
    for name in ("dropout", "ohem", "ema", "momentum"):
        if getattr(args, name) == 1:
            raise UsageError(f"--{name} is {getattr(args, name)}, expected less than 1")
    if args.max_class_share == 0:
        raise UsageError("--max-class-share is 0.0, expected a share above 0, at most 1")
    least = 64 if args.half_resolution else 32
    if not least <= min(args.crop_size) <= max(args.crop_size) <= 2**14:
        raise UsageError(f"--crop-size is {args.crop_size[0]} {args.crop_size[1]}, expected {least} to {2**14} pixels each")
    if not 0 < args.scale_range[0] <= args.scale_range[1] <= 100:
        raise UsageError(f"--scale-range is {args.scale_range[0]} {args.scale_range[1]}, expected 0 < MIN <= MAX <= 100")
    if args.loss_scale != "dynamic":
        try:
            valid = 0 < float(args.loss_scale) <= 2**24
        except ValueError:
            valid = False
        if not valid:
            raise UsageError(f"--loss-scale is {args.loss_scale}, expected dynamic or a positive number such as 128")


# ------------------------------------------------------------------------------------------------------ schedule and loss


def learning_rate(step: int, total_steps: int, peak: float, warmup_steps: int, schedule: str = "poly") -> float:
    """Rate of the step-th of total_steps steps, counted from 0: poly (section 4.1) or cosine, times a linear warm-up."""
    warmup_steps = min(warmup_steps, total_steps // 10)
    warmup = min(1.0, (step + 1) / (warmup_steps + 1))
    done = step / total_steps
    return peak * warmup * ((1 - done) ** POLY_POWER if schedule == "poly" else 0.5 + 0.5 * math.cos(math.pi * done))


def class_power(epoch: int, args: argparse.Namespace) -> float:
    """Power of the classes' weights in an epoch, counted from 1."""
    begin, end = args.class_balance, args.class_balance if args.class_balance_end is None else args.class_balance_end
    return begin + (end - begin) * (epoch - 1) / max(1, args.epochs - 1)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Optimiser groups: weight decay on the kernels of convolutions, but on no depthwise kernel, batch norm or bias."""
    decayed = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    ids = {id(p) for p in decayed}
    others = [p for p in model.parameters() if id(p) not in ids]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimiser in one kernel where PyTorch has it for the device: with fp16 the plain one waits for the device at each step."""
    groups = parameter_groups(model, args.weight_decay)
    if args.optimizer == "sgd":
        make = functools.partial(torch.optim.SGD, groups, lr=args.lr, momentum=args.momentum)
    else:
        make = functools.partial(torch.optim.AdamW, groups, lr=args.lr, betas=(args.momentum, 0.999))
    try:
        optimizer = make(fused=True)
    except RuntimeError:
        optimizer = make()
    if args.optimizer == "sgd" and args.momentum:
        # Else a first step that is skipped leaves them as memory that nobody wrote.
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


@dataclass
class Objective:
    """The loss of a batch, and the parts of it that --ohem, --class-balance, --label-smoothing and --teacher switch on.

    Attributes:
        aux_weight: of each auxiliary loss.
        label_smoothing: share of the target that is spread over all classes.
        ohem: the main loss is over the pixels whose true class gets less than this probability; 0 for all.
        class_shares: (C,) float64 on the CPU, the classes' shares of the pixels, None where they are not weighted.
        class_weights: (C,) float32, None for 1.
        teacher_weight: of the divergence from the teacher's probabilities.
        align_corners: of the network's resizing.
    """

    aux_weight: float = AUX_WEIGHT
    label_smoothing: float = 0.0
    ohem: float = 0.0
    class_shares: Tensor | None = None
    class_weights: Tensor | None = None
    teacher_weight: float = 0.0
    align_corners: bool = False

    def balance(self, power: float, device: torch.device) -> None:
        """Weights classes by their shares to the power of -`power` from now on."""
        if self.class_shares is not None:
            self.class_weights = class_weights(self.class_shares, power).to(device)

    def __call__(
        self, outputs: Tensor | tuple[Tensor, ...], target: Tensor, teacher: Tensor | None = None, world_size: int = 1
    ) -> Tensor:
        """This process' part of the loss, so that the parts of all processes add up to it.

        Each mean is over the pixels of all processes that it is taken of, labelled ones or hard ones, weighted with their class'
        weights: however many processes share the batch, the loss is that of one. Only the hardest sixteenth of --ohem is each
        process' own.

        Args:
            outputs: (N, C, h, w) logits at a lower resolution, of the main head and of the auxiliary ones.
            target: (N, H, W) uint8 train ids.
            teacher: (N, C, h, w) logits of the teacher.
            world_size: number of processes.
        """
        main, *aux = outputs if isinstance(outputs, tuple) else (outputs,)
        options = {
            "ignore_index": IGNORE,
            "weight": self.class_weights,
            "label_smoothing": self.label_smoothing,
            "align_corners": self.align_corners,
        }
        labelled = target != IGNORE
        weights = labelled
        if self.class_weights is not None:
            weights = F.pad(self.class_weights, (0, 256 - len(self.class_weights)))[target.int()]  # 0 where ignored
        counts = [weights.sum(dtype=torch.float32)]
        if self.ohem:
            losses = upsample_cross_entropy(main, target, reduction="none", **options)
            plain = losses.detach()  # -ln of the true class's probability, unless weights or smoothing came in
            if self.label_smoothing or self.class_weights is not None:
                bare = {"ignore_index": IGNORE, "reduction": "none", "align_corners": self.align_corners}
                plain = upsample_cross_entropy(main.detach(), target, **bare)
            hard = labelled & hard_pixels(plain, labelled, self.ohem)
            main_sum = (losses * hard).sum()
            counts.append((weights * hard).sum(dtype=torch.float32))
        else:
            main_sum = upsample_cross_entropy(main, target, reduction="sum", **options)
        if teacher is not None:
            if teacher.shape[2:] != main.shape[2:]:  # another padding of the first convolution
                teacher = F.interpolate(teacher, main.shape[2:], mode="bilinear", align_corners=False)
            rows, columns = (
                torch.arange(size, device=target.device) * whole // size
                for size, whole in zip(main.shape[2:], target.shape[1:])
            )
            taught = labelled[:, rows[:, None], columns]  # (N, h, w)
            counts.append(taught.sum(dtype=torch.float32))
        counts = torch.stack(counts)
        if world_size > 1:
            dist.all_reduce(counts)
        counts = counts.clamp(min=1e-6)
        aux_sum = sum(upsample_cross_entropy(output, target, reduction="sum", **options) for output in aux)
        loss = main_sum / counts[1 if self.ohem else 0] + self.aux_weight * aux_sum / counts[0]
        if teacher is not None:
            log_p, log_q = main.float().log_softmax(1), teacher.float().log_softmax(1)
            divergence = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)  # (N, h, w)
            loss = loss + self.teacher_weight * (divergence * taught).sum() / counts[-1]
        return loss


def hard_pixels(losses: Tensor, labelled: Tensor, probability: float) -> Tensor:
    """(N, H, W) bool: where the true class gets less than `probability`, and the hardest sixteenth in any case.

    The sixteenth is found among every fourth pixel of every fourth row. Nothing here waits for the device.
    """
    sample = losses[:, ::4, ::4].where(labelled[:, ::4, ::4], -1.0).flatten()
    hardest = sample.topk(max(1, sample.numel() // 16), sorted=False).values.min()
    return losses >= hardest.clamp(max=-math.log(probability))


def class_shares(dataset: SegmentationDataset, threads: int = 4) -> Tensor:
    """(C,) float64: each class' share of the labelled pixels of a dataset. Reads all label maps."""

    def count(index: int) -> np.ndarray:
        if dataset.cache:
            return np.bincount(dataset.cache[index][1].ravel(), minlength=256)
        return np.bincount(np.asarray(read_label(dataset.samples[index].label, dataset.table)).ravel(), minlength=256)

    with ThreadPoolExecutor(threads) as pool:
        counts = sum(pool.map(count, range(len(dataset))))[: len(dataset.classes.names)]
    return torch.from_numpy(counts / max(1, counts.sum()))


def class_weights(shares: Tensor, power: float) -> Tensor:
    """(C,) float32: shares to the power of -`power`, so that the mean over all pixels is 1; 0 for a class that does not occur."""
    weights = torch.where(shares > 0, shares.clamp(min=1e-12) ** -power, 0.0)
    return (weights / (weights * shares).sum().clamp(min=1e-12)).float()


def make_objective(
    args: argparse.Namespace,
    model: FastSCNN,
    dataset: SegmentationDataset,
    device: torch.device,
    rank: int,
    world_size: int,
    log: Log,
) -> Objective:
    """The loss as the flags have it; rank 0 counts the classes where they are to be weighted."""
    shares = None
    if args.class_balance or args.class_balance_end:
        names = dataset.classes.names
        zeros = torch.zeros(len(names), dtype=torch.float64)
        shares = class_shares(dataset, os.cpu_count() or 1) if rank == 0 else zeros
        if world_size > 1:
            shares = shares.to(device)
            dist.broadcast(shares, 0)
            shares = shares.cpu()
        weights = class_weights(shares, args.class_balance)
        log.line(f"class weights {' '.join(f'{name}={weight:.2f}' for name, weight in zip(names, weights.tolist()))}")
    return Objective(args.aux_weight, args.label_smoothing, args.ohem, shares, None, args.teacher_weight, model.align_corners)


class MovingAverage:
    """Exponential moving average of a network's parameters and statistics (Polyak averaging): `model` is the averaged network.

    The decay of step t, counted from 1, is min(decay, t / (t + 9)), so that the first steps are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay, self.steps = decay, 0
        floating = [name for name, value in model.state_dict().items() if value.is_floating_point()]
        self.pairs = [[each.state_dict()[name] for name in floating] for each in (self.model, model)]

    @torch.no_grad()
    def update(self) -> None:
        """After a step of the optimiser."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 9))
        torch._foreach_lerp_(*self.pairs, 1 - decay)


def choose_amp(name: str, device: torch.device) -> str:
    """ "bf16", "fp16" or "off" for --amp; auto asks the hardware."""
    if name != "auto":
        return name
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "off"
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", lambda: False)
    try:
        native = supported(including_emulation=False)  # CUDA's also counts GPUs that compute bf16 in float32, slowly
    except TypeError:
        native = supported()
    return "bf16" if native else "fp16"


# -------------------------------------------------------------------------------------------------------------- one epoch


@contextlib.contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Gives errors of writing the name of the file, which a full disk's lack."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def lock(file: IO, out: Path) -> None:
    """Holds an open file against other runs, as long as this process lives and the file is open. Raises UsageError where one has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which loader's workers do not inherit, unlike that of flock
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # others say that the file system has no locks
            raise UsageError(f"{out}: another run is writing there; give another --out, or wait for it") from None


class Log:
    """Lines for people on stdout and in train.log, records for programs in metrics.jsonl; rank 0 alone writes."""

    def __init__(self, folder: Path | None, rank: int, tensorboard: bool = False):
        """`folder` None: lines on stdout alone. Raises UsageError where TensorBoard is asked for and is not installed."""
        self.rank = rank
        self.text = self.records = self.board = None
        if rank == 0 and folder:
            if tensorboard:
                import_option("tensorboard", "--tensorboard")
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(folder))
            folder.mkdir(parents=True, exist_ok=True)
            self.text = open(folder / "train.log", "a", encoding="utf-8", errors="backslashreplace")
            lock(self.text, folder.parent)
            self.records = open(folder / "metrics.jsonl", "a", encoding="utf-8")

    def line(self, text: str) -> None:
        """One line for people."""
        if self.rank == 0:
            print(text, flush=True)
        if self.text:
            with named(self.text.name):
                print(text, file=self.text, flush=True)

    def record(self, **fields) -> None:
        """One JSON object for programs."""
        if self.records:
            with named(self.records.name):
                print(json.dumps(fields), file=self.records, flush=True)
        if self.board:
            at = fields.get("step", fields["epoch"])
            for name, value in fields.items():
                if isinstance(value, int | float) and name not in ("epoch", "step"):
                    self.board.add_scalar(f"{fields['kind']}/{name}", value, at)
            self.board.flush()

    def close(self) -> None:
        """Closes the files."""
        if self.board:
            self.board.close()
        for file in (self.text, self.records):
            with contextlib.suppress(OSError):  # said when the line was written
                if file:
                    file.close()


class Progress:
    """How far the run is, its speed and the time left, measured since this process began to train."""

    def __init__(self, first_step: int, total_steps: int, batch_size: int, half_steps: int = 0):
        """`half_steps`: so many steps, the first ones of the run, are at half the resolution and a quarter of the work."""
        self.half_steps = half_steps
        self.first_step, self.total_steps, self.batch_size = first_step, total_steps, batch_size
        self.start = self.last_time = time.perf_counter()
        self.last_step = first_step

    def report(self, step: int) -> tuple[float, float]:
        """(images per second since the last report, seconds left for the whole run, validation counted in)."""
        now = time.perf_counter()
        rate = (step - self.last_step) * self.batch_size / max(now - self.last_time, 1e-9)
        first, done, total = (s - 0.75 * min(s, self.half_steps) for s in (self.first_step, step, self.total_steps))
        left_s = (now - self.start) / (done - first) * (total - done)
        self.last_step, self.last_time = step, now
        return rate, left_s

    def pause(self) -> None:
        """Leaves the time since the last report, spent on validation, out of the next rate."""
        self.last_time = time.perf_counter()


class Tally:
    """Loss and skipped steps, counted on the device, so that no step waits for the host.

    Attributes:
        loss_sum: of this process, over the steps since the last log line that were not skipped.
        steps: since the last log line.
        skipped: (4,) int64: steps skipped since the last log line, in a row until now, in the longest row since that line, in all.
    """

    def __init__(self, device: torch.device):
        self.loss_sum = torch.zeros((), device=device)
        self.skipped = torch.zeros(4, dtype=torch.int64, device=device)
        self.steps = 0

    def add(self, loss: Tensor, bad: Tensor) -> None:
        """A step's loss, and () bool: whether it was skipped."""
        self.loss_sum += loss.where(~bad, 0.0)
        lately, row, longest, total = self.skipped.unbind()
        row = (row + 1) * bad
        self.skipped = torch.stack([lately + bad, row, torch.maximum(longest, row), total + bad])
        self.steps += 1

    def report(self, world_size: int) -> tuple[float | None, list[int]]:
        """(mean loss over all processes, None where all steps were skipped; `skipped`), and begins anew."""
        if world_size > 1:
            dist.all_reduce(self.loss_sum)
        skipped = self.skipped.tolist()
        counted = self.steps - skipped[0]
        mean = self.loss_sum.item() / counted if counted else None
        self.loss_sum.zero_()
        self.skipped[0] = self.skipped[2] = self.steps = 0
        return mean, skipped

    def state(self, world_size: int) -> dict:
        """Plain numbers of all processes, for a checkpoint; all of them call this."""
        sums = [self.loss_sum.cpu()]
        if world_size > 1:
            gathered = [torch.zeros_like(self.loss_sum) for _ in range(world_size)]
            dist.all_gather(gathered, self.loss_sum)
            sums = [each.cpu() for each in gathered]
        return {"loss_sums": torch.stack(sums), "steps": self.steps, "skipped": self.skipped.cpu()}

    def load(self, state: dict, rank: int, world_size: int) -> None:
        """What `state` gave; with another number of processes rank 0 takes on the sums of all."""
        sums = state["loss_sums"]
        self.loss_sum.copy_(sums[rank] if len(sums) == world_size else sums.sum() if rank == 0 else 0.0)
        self.skipped.copy_(state["skipped"])
        self.steps = state["steps"]


class Statistics:
    """The running means and variances of a network's batch normalisation, in one tensor, which a skipped step puts back.

    The forward pass has changed them by the time that a step is found to be of no use, and a NaN in them would stay.
    """

    def __init__(self, model: nn.Module):
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        places = [(norm, name) for norm in norms for name in ("running_mean", "running_var")]
        parts = [getattr(norm, name) for norm, name in places]
        self.values = torch.cat(parts)
        for (norm, name), view in zip(places, self.values.split([len(part) for part in parts])):
            setattr(norm, name, view)

    def put_back(self, before: Tensor, bad: Tensor) -> None:
        """`before`: a clone of `values` from before the step; bad: () bool, on the device."""
        torch.where(bad, before, self.values, out=self.values)


class Signals:
    """What all processes do after a step: go on, save, or save and stop.

    SIGTERM and SIGINT ask to stop. A second one ends the process at once, unless it comes within a second: torchrun hands on the
    Ctrl-C that the terminal has sent already. Several processes agree through a small reduction on the host, which is
    under way during the next step: they do what was asked for one step later, all of them after the same step.
    """

    GO_ON, SAVE, STOP = range(3)

    def __init__(self, rank: int, group: dist.ProcessGroup | None, save_minutes: float):
        self.rank, self.group, self.save_s = rank, group, 60 * save_minutes
        self.received: int | None = None
        self.received_at = self.saved_at = time.monotonic()
        self.raises = False
        self.pending: tuple[dist.Work, Tensor] | None = None
        self.earlier: dict[int, object] = {}

    def __enter__(self) -> Signals:
        self.earlier = {each: signal.signal(each, self._receive) for each in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self.received_at = number, now
            if self.raises:
                raise Stopped(number)
        elif now - self.received_at > 1:
            os._exit(128 + number)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Within this a signal need not wait for the end of a step: all is saved. It raises Stopped."""
        self.raises = True
        try:
            if self.received is not None:
                raise Stopped(self.received)
            yield
        finally:
            self.raises = False

    def saved(self) -> None:
        """Counts the minutes to the next checkpoint from now on."""
        self.saved_at = time.monotonic()

    def after_step(self) -> int:
        """GO_ON, SAVE or STOP, the same in every process."""
        verdict = self.GO_ON if self.group else self._wish()
        if self.group:
            if self.pending:
                work, wish = self.pending
                work.wait()
                verdict = int(wish)
            if verdict == self.SAVE:
                self.saved()
            wish = torch.tensor(self._wish(), dtype=torch.int32)
            self.pending = (dist.all_reduce(wish, dist.ReduceOp.MAX, self.group, async_op=True), wish)
        return verdict

    def _wish(self) -> int:
        if self.received is not None:
            return self.STOP
        due = self.save_s and self.rank == 0 and time.monotonic() - self.saved_at > self.save_s
        return self.SAVE if due else self.GO_ON


class Stopped(BaseException):
    """A signal ended the training, after all was saved. As KeyboardInterrupt it is no Exception: it may come while an image is decoded.

    together: all processes stop at this place.
    """

    def __init__(self, number: int | None, together: bool = False):
        super().__init__(signal.Signals(number or signal.SIGTERM).name)
        self.together = together


@dataclass
class Run:
    """What the loop works on: the network bare and as DDP wraps it, the optimiser, and where this process stands."""

    args: argparse.Namespace
    model: FastSCNN
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    rank: int
    world_size: int
    syncs_bn: bool
    log: Log
    tally: Tally
    statistics: Statistics
    signals: Signals
    writer: Writer
    objective: Objective = field(default_factory=Objective)
    average: MovingAverage | None = None
    teacher: FastSCNN | None = None
    launches: list[str] = field(default_factory=list)  # `name_of_launch` of all machines
    best_miou: float = -1.0
    validated: tuple[dict, Tensor] | None = None  # figures and confusion matrix of the last validation

    @property
    def evaluated(self) -> FastSCNN:
        """The network that is validated and saved: the average of --ema, or what is trained."""
        return self.average.model if self.average else self.model

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """Type of the mixed precision, None for float32."""
        return AMP_DTYPES[self.args.amp]


def train_step(run: Run, images: Tensor, target: Tensor, mark: Callable[[str], None] = lambda phase: None) -> Tensor:
    """One step of the optimiser; nothing in it makes the host wait for the device.

    Where the loss or a gradient is no finite number, weights and statistics stay as they were, and the step counts as skipped.

    Args:
        run: what is trained.
        images: (N, H, W, 3) uint8 RGB, this process' share of the batch.
        target: (N, H, W) uint8 train ids.
        mark: called with the name of each phase after it.

    Returns:
        This process' part of the mean loss over the labelled pixels of all processes, on the device.
    """
    device = run.device
    images, target = images.to(device, non_blocking=True), target.to(device, non_blocking=True)
    mark("copy to the device")
    pixels = normalise(images)
    before = run.statistics.values.clone()
    with torch.autocast(device.type, run.amp_dtype, enabled=run.amp_dtype is not None):
        if run.teacher:
            with torch.no_grad():
                taught = run.teacher(pixels, upsample=False)
        outputs = run.wrapped(pixels, upsample=False)
    mark("forward")
    loss = run.objective(outputs, target, taught if run.teacher else None, run.world_size)
    mark("loss")
    run.optimizer.zero_grad(set_to_none=True)
    # DDP averages the gradients. The last factor is 1, or NaN for a loss that is no finite number: then all gradients are.
    run.scaler.scale(loss * run.world_size * (1 + 0 * loss.detach())).backward()
    mark("backward")
    run.scaler.step(run.optimizer)
    bad = sum(run.scaler._found_inf_per_device(run.optimizer).values()) > 0  # the same in all processes, as the gradients are
    run.scaler.update(fixed_scale(run.args))
    run.statistics.put_back(before, bad)
    run.tally.add(loss.detach(), bad)
    if run.average:
        run.average.update()
    mark("optimiser")
    return loss.detach()


def fixed_scale(args: argparse.Namespace) -> float | None:
    """The factor of the loss; None where it follows the gradients. bfloat16 and float32 need none: there the scaler only skips."""
    if args.amp != "fp16":
        return 1.0
    return None if args.loss_scale == "dynamic" else float(args.loss_scale)


def set_training_mode(run: Run) -> None:
    """Training mode, with batch normalisation's statistics as --freeze-bn has them."""
    run.wrapped.train()
    if run.args.freeze_bn:
        for module in run.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def seed_step(args: argparse.Namespace, step: int, rank: int) -> None:
    """Seeds what dropout draws from: the numbers depend on the step, not on what came before, so that a resumed run draws the same."""
    torch.manual_seed(int(np.random.SeedSequence((args.seed, step, rank)).generate_state(1)[0]))


def train_one_epoch(
    run: Run, loader: Iterable[tuple[Tensor, Tensor]], epoch: int, progress: Progress, classes: Classes, done: int = 0
) -> int:
    """One pass over the loader, of whose steps `done` have been done; epochs count from 1.

    Returns what `Signals.after_step` says after the last step, which is up to the caller.

    Raises:
        UsageError: too many steps in a row had no finite loss and gradient; found at the next log line.
        Stopped: a signal ended it; where the epoch was, is saved.
    """
    args = run.args
    set_training_mode(run)
    run.objective.balance(class_power(epoch, args), run.device)
    total_steps = args.epochs * len(loader)
    step, last_step = (epoch - 1) * len(loader) + done, epoch * len(loader)
    for images, target in loader:
        lr = learning_rate(step, total_steps, args.lr, args.warmup_steps, args.schedule)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        seed_step(args, step, run.rank)
        train_step(run, images, target)
        step += 1

        if step % args.log_every == 0 or step == last_step:
            mean_loss, (skipped, _, longest, _) = run.tally.report(run.world_size)
            if longest >= args.max_skipped:
                raise UsageError(
                    f"loss or gradients were no finite numbers in {longest} steps in a row, until step {step} in epoch {epoch}, and "
                    "these were skipped; lower --base-lr, or try --amp off; --resume auto goes on from the newest checkpoint"
                )
            rate, left_s = progress.report(step)
            run.log.line(
                f"epoch {epoch}/{args.epochs}  step {step}/{total_steps}  "
                f"loss {'-' if mean_loss is None else f'{mean_loss:.4f}'}  lr {lr:.5f}  "
                f"{rate:.1f} images/s  left {timedelta(seconds=round(left_s))}{f'  skipped {skipped} steps' if skipped else ''}"
            )
            run.log.record(kind="train", epoch=epoch, step=step, loss=mean_loss, lr=lr, images_per_s=rate, skipped=skipped)
        run.writer.check()
        verdict = run.signals.after_step()
        if verdict and step < last_step:
            save_training(run, classes, epoch - 1, step - (epoch - 1) * len(loader), len(loader))
            if verdict == Signals.STOP:
                raise Stopped(run.signals.received, together=True)
    return verdict


def validate(run: Run, dataset: SegmentationDataset) -> tuple[dict, Tensor]:
    """Metrics and (C, C) confusion matrix of the whole split, its images shared out over the processes.

    Raises:
        UsageError: no pixel of the split has a label.
    """
    if run.world_size > 1 and not run.syncs_bn:
        for buffer in run.evaluated.buffers():  # they differ by the last step: the statistics of rank 0 count, and are saved
            dist.broadcast(buffer, 0)
    segment = accelerate(run.evaluated, device=run.device, precision=run.amp_dtype or torch.float32, mean=MEAN, std=STD)
    confusion = evaluate(
        segment, dataset, device=run.device, workers=run.args.workers, rank=run.rank, world_size=run.world_size
    )
    result = metrics(confusion, dataset.classes)
    if result["miou"] is None:
        raise UsageError(f"no pixel of split {run.args.val_split} has a label; check the label maps below {run.args.data}")
    return result, confusion


# ------------------------------------------------------------------------------------------------------- loader, benchmark


class DeviceLoader:
    """Batches out of a DeviceCache, in the order of a sampler."""

    def __init__(self, cache: DeviceCache, batches: TrainBatches):
        self.cache, self.batches = cache, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.cache.batch, self.batches)


def open_loader(
    args: argparse.Namespace,
    train_set: SegmentationDataset,
    val_set: SegmentationDataset,
    device: torch.device,
    rank: int,
    world_size: int,
) -> tuple[torch.utils.data.DataLoader | DeviceLoader, TrainBatches, list[str]]:
    """The batches of this process, out of the cache that --cache asks for, and what to log of it.

    Raises:
        DataError, UsageError: a cache that does not fit, before anything is decoded; too little room in /dev/shm.
    """
    sharding = {"seed": args.seed, "rank": rank, "world_size": world_size}
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    start, notes = time.perf_counter(), []
    if args.cache == "device":
        needed, room = cache_bytes(train_set), device_room(device)
        if world_size > 1:  # what the smallest device has; all processes have to come to the same answer
            smallest = torch.tensor(room, device=device)
            dist.all_reduce(smallest, dist.ReduceOp.MIN)
            room = int(smallest)
        if needed > room * world_size or (needed > room and len(train_set) < world_size):
            raise UsageError(
                f"--cache device needs {size_text(needed)}, and {world_size} x {size_text(room)} of the devices are "
                "free for it; take --cache ram, or more processes"
            )
        sharded = needed > room
        cache = DeviceCache(train_set, device, range(rank, len(train_set), world_size) if sharded else None, threads)
        batches = TrainBatches(len(train_set), args.batch_size, **sharding, sharded=sharded)
        loader = DeviceLoader(cache, batches)
        whose = f"shared out to {world_size} processes, each with batches of its own part" if sharded else "on each device"
        notes = [f"{len(train_set)} images, {size_text(needed)}, {whose}"]
    else:
        batches = TrainBatches(len(train_set), args.batch_size, **sharding)
        if args.cache == "ram":
            sets, total = [train_set], cache_bytes(train_set)
            if total + cache_bytes(val_set) < 0.8 * free_memory():
                sets, total = [train_set, val_set], total + cache_bytes(val_set)
            share_ram_caches(sets, threads)
            kinds = "of both splits" if len(sets) == 2 else "to train; too little memory for those to validate"
            notes = [f"{sum(map(len, sets))} images {kinds}, {size_text(total)}, shared by all processes"]
        check_shared_memory(args, args.batch_size // world_size)
        loader = torch.utils.data.DataLoader(
            train_set,
            batch_sampler=batches,
            num_workers=args.workers,
            pin_memory=device.type != "cpu",
            persistent_workers=args.workers > 0,
            worker_init_fn=outlive_signals,
            generator=torch.Generator(),  # else a process' first epoch draws one number more of those that dropout uses
        )
    return loader, batches, [f"cache {args.cache}: {note}, in {time.perf_counter() - start:.1f} s" for note in notes]


def device_room(device: torch.device) -> int:
    """Bytes of a device's memory that a cache may take; the rest is left to the network."""
    if device.type == "cpu":
        return int(0.6 * free_memory()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return int(0.6 * torch.get_device_module(device).mem_get_info(device)[0])


def share_ram_caches(datasets: Sequence[SegmentationDataset], threads: int) -> None:
    """Gives datasets a cache, decoded by the first process of each machine and mapped by the others."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        for dataset in datasets:
            dataset.cache = RamCache(dataset, threads)
        return
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    first = dist.get_rank() - local_rank
    firsts = gathered([first], dist.get_world_size())  # of each process' machine, which may have processes in different numbers
    machine, _ = dist.new_subgroups_by_enumeration(
        [[r for r, of in enumerate(firsts) if of == each] for each in sorted({*firsts})]
    )
    for dataset in datasets:
        cache = [RamCache(dataset, threads * local_size) if local_rank == 0 else None]
        dist.broadcast_object_list(cache, src=first, group=machine)
        dataset.cache = cache[0]


def check_shared_memory(args: argparse.Namespace, share: int) -> None:
    """Raises UsageError where the workers' batches do not fit in /dev/shm, which would end them with a bus error."""
    height, width = (size // 2 if args.half_resolution == 1 else size for size in args.crop_size)
    batch = 4 * share * height * width
    needed = 3 * batch * args.workers * int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # two ahead per worker, one in use
    with contextlib.suppress(FileNotFoundError):
        free = shutil.disk_usage("/dev/shm").free
        if needed > free:
            raise UsageError(
                f"{args.workers} workers need up to {size_text(needed)} of /dev/shm, which has {size_text(free)}; "
                "enlarge it (docker run --shm-size), or give fewer --workers"
            )


class Clock:
    """Time spent in the phases of a step, in seconds; each mark waits for the device."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}
        self.start()

    def start(self) -> None:
        """Leaves out the time since the last mark."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.last = time.perf_counter()

    def __call__(self, phase: str) -> None:
        before = self.last
        self.start()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self.last - before


def benchmark(run: Run, loader: torch.utils.data.DataLoader | DeviceLoader, batches: TrainBatches, steps: int) -> dict:
    """Images per second of the loader alone, of the training alone and of both, over `steps` steps each; writes nothing."""
    device, total = run.device, run.args.batch_size

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in itertools.count(1):
            batches.set_epoch(epoch)
            yield from loader

    def rate(start: float) -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return round(steps * total / (time.perf_counter() - start), 2)

    warmup = 3
    set_training_mode(run)
    run.objective.balance(run.args.class_balance, device)
    result = {"device": str(device), "processes": run.world_size, "precision": run.args.amp, "cache": run.args.cache}
    result |= {"batch_size": total, "steps": steps}
    source = endless()
    for _ in range(warmup + 2 * max(1, run.args.workers)):  # what the workers had made ahead does not count
        images, target = next(source)
    result["crop_size"] = list(images.shape[1:3])
    start = time.perf_counter()
    for _ in range(steps):
        next(source)
    result["loader_images_per_s"] = rate(start)
    for _ in range(warmup):
        train_step(run, images, target)
    start = time.perf_counter()
    for _ in range(steps):
        train_step(run, images, target)
    result["step_images_per_s"] = rate(start)
    clock = Clock(device)
    for _ in range(steps):
        clock.start()
        train_step(run, images, target, clock)
    result["step_ms"] = {phase: round(1000 * seconds / steps, 3) for phase, seconds in clock.seconds.items()}
    start = time.perf_counter()
    for _ in range(steps):
        train_step(run, *next(source))
    result["images_per_s"] = rate(start)
    if device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    else:
        peak = torch.get_device_module(device).max_memory_allocated(device)
    result["peak_memory_mib"] = round(peak / 2**20)
    return result


# ------------------------------------------------------------------------------------------------------------ checkpoints


def save(checkpoint: dict, path: Path) -> None:
    """Writes beside `path`, to the disk, and renames, so that a file of this name is whole even after a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    content = io.BytesIO()
    torch.save(checkpoint, content)  # on a full disk it would raise errors of its own
    try:
        with named(path), open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # not every system lets a folder be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


class Writer:
    """Writes checkpoints in a thread of its own, in order, while the training goes on."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(1, "checkpoints")
        self.pending: Future | None = None

    def save(self, checkpoint: dict, path: Path, then: Callable[[], None] = lambda: None) -> None:
        """Writes what the checkpoint holds now, and calls `then`. Raises what went wrong with the one before, once that is done."""
        checkpoint = detached(checkpoint)
        self.wait()

        def write() -> None:
            save(checkpoint, path)
            then()

        self.pending = self.pool.submit(write)

    def check(self) -> None:
        """Raises OSError where writing has failed meanwhile."""
        if self.pending and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Until all is written. Raises OSError where that failed."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()


def detached(value):
    """A copy, on the CPU, of the tensors in dicts and lists: training goes on and changes them."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: detached(each) for key, each in value.items()}
    return [detached(each) for each in value] if isinstance(value, list) else value


def position(path: Path) -> tuple[int, int] | None:
    """(whole epochs, steps of the next one) of a checkpoint by its name, 12.pth or 12+345.pth; None of other files."""
    match = re.fullmatch(r"(\d+)(?:\+(\d+))?\.pth", path.name, re.ASCII)
    return (int(match[1]), int(match[2] or 0)) if match else None


def numbered_checkpoints(folder: Path) -> list[Path]:
    """The {epoch}.pth and {epoch}+{steps}.pth files of a folder, oldest first."""
    return sorted((path for path in folder.glob("*.pth") if position(path)), key=position)


def remove_old(folder: Path, keep: int) -> None:
    """Leaves the newest checkpoint and `keep` of whole epochs."""
    found = numbered_checkpoints(folder)
    whole = [path for path in found if position(path)[1] == 0]
    for path in found[:-1]:
        if path not in whole[-keep:]:
            path.unlink()


def name_of_launch() -> str | None:
    """A name that this process has in common with those that the same torchrun started on this machine, before a restart too.

    It is that of the folder, new for each launch, in which torchrun looks for their errors; None without torchrun.
    """
    file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "-"))  # FOLDER/attempt_0/0/error.json
    return file.parents[2].name if len(file.parents) > 2 else None


def find_resume(args: argparse.Namespace, notes: list[str]) -> tuple[Path, dict] | None:
    """The checkpoint that --resume asks for and its path; None to begin anew.

    Of "auto" it is the newest one that is whole; which were passed over is added to `notes`. So it is after a restart by torchrun,
    whatever --resume says, once this launch has come to a checkpoint.

    Raises:
        FileNotFoundError, CheckpointError: a path was given, and it is missing or cannot be resumed from; or of the checkpoints
            that there are none is whole.
    """
    launch = name_of_launch()
    restarts = launch and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    found = numbered_checkpoints(Path(args.out) / "checkpoints")
    if args.resume == "auto" or restarts:
        for path in reversed(found):
            try:
                checkpoint = read_training_state(path)
            except CheckpointError as error:
                notes.append(f"passed over {error}")
                continue
            if args.resume == "auto" or launch in checkpoint.get("launches", []):
                return path, checkpoint
            break  # of an earlier run
    if args.resume == "auto":
        if found:
            raise CheckpointError(f"{found[0].parent}: none of {len(found)} checkpoints can be resumed; {notes[0]}")
        return None
    return (Path(args.resume), read_training_state(Path(args.resume))) if args.resume else None


def read_training_state(path: Path) -> dict:
    """A checkpoint with all that resuming needs. Raises FileNotFoundError or CheckpointError."""
    checkpoint = read_checkpoint(path)
    missing = {"epoch", "optimizer", "scaler", "best_miou", "validated", "args", "classes"} - checkpoint.keys()
    if missing:
        raise CheckpointError(f"{path}: holds no {', '.join(sorted(missing))}, so no training state; take a numbered one")
    return checkpoint


def init_weights(model: FastSCNN, path: str) -> str:
    """Copies the weights of a checkpoint into the network; returns what was not copied, in a line for people.

    Raises:
        FileNotFoundError, CheckpointError: there is no such file, or it is of another variant.
    """
    found = build_from_checkpoint(read_checkpoint(path), path)
    variant, classes = found.args["variant"], found.args["num_classes"]
    if variant != model.args["variant"]:
        raise CheckpointError(f"{path}: is of variant {variant}; give --variant {variant}")
    heads = {"classifier.conv", "aux_detail.conv", "aux_context.conv"} if classes != model.args["num_classes"] else set()
    wanted = model.state_dict().keys()
    state = {
        name: tensor for name, tensor in found.state_dict().items() if name in wanted and name.rpartition(".")[0] not in heads
    }
    missing, _ = model.load_state_dict(state, strict=False)
    anew = sorted({name.rpartition(".")[0] for name in missing})
    return f"began with {path}, {classes} classes; begun anew: {', '.join(anew) or 'nothing'}"


def load_teacher(path: str, classes: Classes) -> FastSCNN:
    """The network of --teacher. Raises FileNotFoundError or CheckpointError where there is none of these classes."""
    checkpoint = read_checkpoint(path)
    names = checkpoint.get("classes", {}).get("names", list(classes.names))  # another project's file does not tell
    if names != list(classes.names):
        raise CheckpointError(f"{path}: was trained on other classes than this run's; train a teacher on this dataset")
    return build_from_checkpoint(checkpoint, path, len(classes.names)).requires_grad_(False)


def check_machines(folder: Path, newest: list[list[Path]]) -> None:
    """Raises UsageError where the machine of another process has a newer checkpoint than that of process 0, which alone reads them.

    newest: of each process, its newest checkpoint, in a list that may be empty.
    """
    for rank, paths in enumerate(newest):
        if paths and (not newest[0] or position(paths[0]) > position(newest[0][0])):
            raise UsageError(
                f"{paths[0]} of process {rank} is newer than what the machine of process 0 has in {folder}; begin with the machine "
                "that has it, or copy it there"
            )


def check_resume(path: Path, checkpoint: dict, model: FastSCNN, classes: Classes, args: argparse.Namespace) -> None:
    """Raises CheckpointError where the checkpoint is of another network, other classes or, found by auto, other data."""
    differing = {k: (v, model.args.get(k)) for k, v in checkpoint["model_args"].items() if v != model.args.get(k)}
    if differing:
        text = ", ".join(f"{name} {was} (here {now})" for name, (was, now) in differing.items())
        raise CheckpointError(f"{path}: is of a network with {text}; resume with its own arguments, or begin anew")
    optimizer = checkpoint["args"].get("optimizer", "sgd")
    if optimizer != args.optimizer:
        raise CheckpointError(f"{path}: holds the state of {optimizer}; give --optimizer {optimizer}, or begin anew")
    if "trained" in checkpoint and not args.ema:
        raise CheckpointError(
            f"{path}: holds a moving average beside the weights; give --ema, or begin anew with --init-weights"
        )
    if checkpoint["classes"]["names"] != list(classes.names):
        raise CheckpointError(f"{path}: was trained on other classes; resume on its own dataset, or begin anew")
    if args.resume == "auto" and Path(checkpoint["args"]["data"]).resolve() != Path(args.data).resolve():
        raise CheckpointError(
            f"{path}: was trained on {checkpoint['args']['data']}, this run on {args.data}; give another --out, or this "
            "path to --resume where the data has only moved"
        )


def save_training(run: Run, classes: Classes, epoch: int, steps: int, steps_per_epoch: int, validated: bool = True) -> None:
    """Saves all that resuming after `epoch` whole epochs and `steps` of the next one needs; all processes call this.

    Raises:
        UsageError: weights that are no finite numbers, which are never saved.
    """
    tensors = [*run.model.parameters(), run.statistics.values]
    if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
        raise UsageError(
            f"weights are no finite numbers after {epoch} epochs and {steps} steps, and were not saved; lower --base-lr; "
            "--resume auto goes on from the newest checkpoint"
        )
    tally = run.tally.state(run.world_size)
    run.signals.saved()
    if run.rank == 0:
        state = {
            **network_state(run, classes, epoch),
            "steps": steps,
            "steps_per_epoch": steps_per_epoch,
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "tally": tally,
            "best_miou": run.best_miou,
            "validated": validated,
            "world_size": run.world_size,
            "launches": run.launches,
            "args": vars(run.args),
        }
        if run.average:
            state["trained"] = run.model.state_dict()  # of which `model` is the average
        folder = Path(run.args.out) / "checkpoints"
        path = folder / (f"{epoch}+{steps}.pth" if steps else f"{epoch}.pth")
        run.writer.save(state, path, functools.partial(remove_old, folder, run.args.keep))


def network_state(run: Run, classes: Classes, epoch: int) -> dict:
    """What every checkpoint holds: the network, and how to build and use it."""
    return {"model": run.evaluated.state_dict(), "model_args": run.model.args, "classes": classes.to_dict(), "epoch": epoch}


def finish_epoch(
    run: Run, val_set: SegmentationDataset, epoch: int, total_epochs: int, steps_per_epoch: int, verdict: int = Signals.GO_ON
) -> None:
    """Saves {epoch}.pth, validates when that is due, and writes best_model.pth where it is the best.

    What is due is saved before it is validated, marked so: an image that cannot be read does not cost the epoch, and a
    resumed run makes the validation up. `verdict` is that of `train_one_epoch`.
    """
    due = epoch % run.args.val_every == 0 or epoch == total_epochs
    if due or verdict or epoch % run.args.save_every == 0:
        save_training(run, val_set.classes, epoch, 0, steps_per_epoch, validated=not due)
    if verdict == Signals.STOP:
        raise Stopped(run.signals.received, together=True)
    if not due:
        return
    with run.signals.raising():
        result, _ = run.validated = validate(run, val_set)
    run.log.line(f"epoch {epoch}/{total_epochs}  mIoU {result['miou']:.4f}  pixel accuracy {result['pixel_accuracy']:.4f}")
    run.log.record(kind="val", epoch=epoch, **result)
    if result["miou"] > run.best_miou:
        run.best_miou = result["miou"]
        if run.rank == 0:
            best = Path(run.args.out) / "checkpoints" / "best_model.pth"
            run.writer.save({**network_state(run, val_set.classes, epoch), "miou": run.best_miou}, best)
    save_training(run, val_set.classes, epoch, 0, steps_per_epoch)


def prepare_output(out: Path, resumed: tuple[Path, dict] | None) -> list[str]:
    """Makes the folders below `out`, and moves what this run would overwrite or mix with to out/earlier/TIME.

    That is a whole earlier run, unless this run goes on from a checkpoint of it; then it is later checkpoints.
    Log records of steps that will be done again are dropped. Returns what was done, in lines for people.
    """

    def epoch_of_best(path: Path) -> float:
        with contextlib.suppress(OSError, CheckpointError, KeyError):
            return read_checkpoint(path)["epoch"]
        return float("inf")  # none, or of no use

    def known(line: str) -> bool:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            if record["kind"] == "val":
                return record["epoch"] <= epoch - (not resumed[1]["validated"])
            return record["epoch"] <= epoch or record["step"] <= step
        return False  # cut off when the run was

    folder, logs = out / "checkpoints", out / "logs"
    best = folder / "best_model.pth"
    with contextlib.suppress(FileNotFoundError), open(logs / "train.log", "r+b") as file:
        lock(file, out)
    for path in [*folder.glob(".*.tmp"), *logs.glob(".*.tmp")]:  # of a process that was killed while it wrote
        path.unlink()
    continues = resumed is not None and resumed[0].resolve().parent == folder.resolve()
    if continues:
        epoch, steps = resumed[1]["epoch"], resumed[1].get("steps", 0)
        step = epoch * resumed[1].get("steps_per_epoch", 0) + steps
        stale = [path for path in numbered_checkpoints(folder) if position(path) > (epoch, steps)]
        stale += [best] if best.exists() and epoch_of_best(best) > epoch else []
        if (logs / "metrics.jsonl").exists():
            lines = (logs / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and known(line)]
            with named(logs / "metrics.jsonl"):
                (logs / ".metrics.jsonl.tmp").write_text("".join(kept), encoding="utf-8")
            os.replace(logs / ".metrics.jsonl.tmp", logs / "metrics.jsonl")
    else:
        stale = [path for path in (folder, logs) if path.exists()]
    notes = []
    if stale:
        earlier = out / "earlier" / datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        earlier.mkdir(parents=True)
        for path in stale:
            path.rename(earlier / path.name)
        notes.append(f"moved {', '.join(path.name for path in stale)} of an earlier run to {earlier}")
    folder.mkdir(parents=True, exist_ok=True)
    if resumed and not continues:
        source = resumed[0].with_name("best_model.pth")
        if epoch_of_best(source) <= resumed[1]["epoch"]:
            shutil.copy(source, best)
            notes.append(f"copied {source}")
    return notes


# ------------------------------------------------------------------------------------------------------------------- main


def keep_freed_memory() -> None:
    """Lets glibc keep the memory that a step frees, for the next step, instead of handing it back to the kernel.

    On the CPU each large tensor is otherwise mapped, zeroed page by page and unmapped again, a quarter of a step's time.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to do
        mallopt = ctypes.CDLL(None).mallopt
        m_mmap_max, m_trim_threshold = -4, -1  # from malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)  # never


def describe(run: Run, train_images: int, val_images: int, steps_per_epoch: int) -> None:
    """The lines at the start of a log: everything that decides what this run will do."""
    args, world_size = run.args, run.world_size
    share = args.batch_size // world_size
    parameters = sum(p.numel() for p in run.model.parameters())
    run.log.line(f"code {git_revision()}  torch {torch.__version__}  {' '.join(f'{k}={v}' for k, v in vars(args).items())}")
    run.log.line(f"device {run.device}  processes {world_size}  precision {args.amp}  parameters {parameters:,} in training")
    run.log.line(
        f"batch {args.batch_size} = {share} x {world_size}  "
        f"learning rate {args.base_lr} x {args.batch_size} / {PAPER_BATCH} = {args.lr:.5f}"
    )
    run.log.line(f"{train_images} images to train, {val_images} to validate  {steps_per_epoch} steps x {args.epochs} epochs")
    run.log.line(f"ops {' '.join(f'{op}={which}' for op, which in implementations(run.device).items())}")
    if world_size > 1 and not run.syncs_bn:
        why = "PyTorch has no SyncBatchNorm on the CPU" if args.sync_bn else "--no-sync-bn"
        run.log.line(f"{why}: each process normalises over its own {share} images")
    if train_images < args.batch_size:
        run.log.line(f"fewer images ({train_images}) than the batch ({args.batch_size}): they are repeated within it")


def main(argv: list[str] | None = None) -> int:
    """Trains as the command line says. Returns the exit status: 0, or STOPPED after a signal."""
    args = parse_args(argv)
    args.data = args.data or f"datasets/{args.dataset}"
    check_args(args, int(os.environ.get("WORLD_SIZE", 1)))
    out = Path(args.out)

    # Data and the checkpoint to resume from are looked at before anything is written or any process waits for another.
    names = ("brightness", "channel_noise", "contrast", "saturation", "hue", "max_class_share")
    choices = {"scale_range": tuple(args.scale_range), **{name: getattr(args, name) for name in names}}
    if not args.augment:
        choices = {"scale_range": (1.0, 1.0), "flip": False, "brightness": 0.0, "channel_noise": 0.0}
    half_epochs = round(args.half_resolution * args.epochs)
    for name in ("teacher", "init_weights"):
        path = getattr(args, name)
        if path and Path(path).resolve().parent == (out / "checkpoints").resolve():
            raise UsageError(
                f"--{name.replace('_', '-')} {path} lies in this run's own --out {out}, which replaces it; give another --out"
            )
    augmentation = Augmentation(tuple(args.crop_size), **choices, half_epochs=half_epochs, seed=args.seed)
    train_set = open_dataset(args.dataset, args.data, args.split, augmentation)
    val_set = open_dataset(args.dataset, args.data, args.val_split)
    classes = train_set.classes
    torch.manual_seed(args.seed)
    model = FastSCNN(len(classes.names), variant=args.variant, aux=args.aux, dropout=args.dropout)
    teacher = load_teacher(args.teacher, classes) if args.teacher else None
    begun: list[str] = []  # what to log of how it began
    resumed = None
    if int(os.environ.get("RANK", 0)) == 0:  # the others get it from this process, whose disk may be another
        resumed = find_resume(args, begun)
        if resumed:
            check_resume(*resumed, model, classes, args)

    log = None
    try:
        device, rank, world_size = start_processes(args.device, args.peer_timeout)
        hosts = dist.new_group(backend="gloo", timeout=timedelta(minutes=args.peer_timeout)) if world_size > 1 else None
        if hosts:
            if args.resume == "auto":
                check_machines(out / "checkpoints", gathered([numbered_checkpoints(out / "checkpoints")[-1:]], world_size))
            shared = [resumed]
            dist.broadcast_object_list(shared, 0, hosts)
            [resumed] = shared
        if args.init_weights and not resumed:
            begun.append(init_weights(model, args.init_weights))
        if device.type == "cpu":
            keep_freed_memory()
        args.amp = choose_amp(args.amp, device)
        args.lr = args.base_lr * args.batch_size / PAPER_BATCH
        syncs_bn = world_size > 1 and args.sync_bn and device.type != "cpu"
        if args.batch_size == world_size and not syncs_bn and not args.freeze_bn:
            raise UsageError(
                "one image per process leaves batch normalisation of the pyramid's 1x1 bin a single value; give "
                f"--batch-size {2 * world_size} or more"
            )
        loader, batches, cached = open_loader(args, train_set, val_set, device, rank, world_size)
        notes = prepare_output(out, resumed) if rank == 0 and not args.benchmark else []
        log = Log(None if args.benchmark else out / "logs", rank, args.tensorboard)
        for note in [*notes, *cached, *begun]:
            log.line(note)

        model.to(device, memory_format=torch.channels_last)
        if syncs_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # before the DDP wrap
        statistics = Statistics(model)
        optimizer = make_optimizer(model, args)
        scaler = torch.amp.GradScaler(device.type, init_scale=fixed_scale(args) or 65536.0)

        average = MovingAverage(model, args.ema) if args.ema else None
        if teacher:
            teacher.to(device, memory_format=torch.channels_last)

        wrapped = model
        if world_size > 1:
            device_ids = None if device.type == "cpu" else [device.index]
            wrapped = nn.parallel.DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
        signals, writer, tally = Signals(rank, hosts, args.save_minutes), Writer(), Tally(device)
        objective = make_objective(args, model, train_set, device, rank, world_size, log)
        run = Run(
            args, model, wrapped, optimizer, scaler, device, rank, world_size, syncs_bn, log, tally, statistics, signals, writer,
            objective, average, teacher, sorted({*filter(None, gathered([name_of_launch()], world_size))}),
        )  # fmt: skip
        steps = len(batches)
        epochs_done, steps_done = resume(run, *resumed, steps) if resumed else (0, 0)
        if args.resume and not resumed:
            log.line(f"nothing to resume in {out / 'checkpoints'}: beginning anew")
        describe(run, len(train_set), len(val_set), steps)
        if args.benchmark:
            result = benchmark(run, loader, batches, args.benchmark)
            if rank == 0:
                print(json.dumps(result))
            return 0

        with signals:
            try:
                if resumed and not resumed[1]["validated"]:
                    finish_epoch(run, val_set, epochs_done, resumed[1]["args"]["epochs"], steps)
                elif run.best_miou < 0 and epochs_done == args.epochs:  # it has lost its best_model.pth
                    finish_epoch(run, val_set, epochs_done, args.epochs, steps)
                progress = Progress(epochs_done * steps + steps_done, args.epochs * steps, args.batch_size, half_epochs * steps)
                for epoch in range(epochs_done + 1, args.epochs + 1):
                    batches.set_epoch(epoch, steps_done)
                    verdict = train_one_epoch(run, loader, epoch, progress, classes, steps_done)
                    finish_epoch(run, val_set, epoch, args.epochs, steps, verdict)
                    progress.pause()
                    steps_done = 0
            except Stopped as stopped:
                writer.wait()
                if hosts and stopped.together:  # torchrun ends the others when one is gone, and process 0 may still be writing
                    with contextlib.suppress(RuntimeError):
                        dist.barrier(hosts)
                log.line(f"stopped by {stopped}, all is saved; the same flags with --resume auto go on")
                return STOPPED
            finally:
                with contextlib.suppress(OSError):  # of an error on the way already, or said below
                    failed = writer.pending
                    writer.wait()
            if failed:
                failed.result()
        if run.validated and rank == 0:
            write_report(
                out / "report.html",
                report_title(args.data, args.val_split),
                classes,
                run.validated[0],
                confusion=run.validated[1],
                log=out / "logs" / "metrics.jsonl",
                facts={"device": str(device)},
                arguments={"Arguments of train.py": vars(args)},
            )
        if skipped := int(tally.skipped[3]):
            log.line(f"{skipped} steps in all had no finite loss and gradient, and were skipped")
        log.line(f"done: best mIoU {run.best_miou:.4f}, {out / 'checkpoints' / 'best_model.pth'}")
        return 0
    except RuntimeError as error:
        full = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)  # the CPU's has no class of its own
        if full:
            raise UsageError(
                f"{args.batch_size} crops of {args.crop_size[0]}x{args.crop_size[1]} do not fit in memory; lower --batch-size or --crop-size"
            ) from None
        if dist.is_initialized() and lost_peer(error):
            raise UsageError(
                f"lost another process ({' '.join(str(error).split())[:160]}); what it said last tells why; --resume auto goes on "
                "from the newest checkpoint"
            ) from None
        raise
    finally:
        if log is not None:
            log.close()


def resume(run: Run, path: Path, checkpoint: dict, steps_per_epoch: int) -> tuple[int, int]:
    """Puts a run where the checkpoint was; returns its whole epochs and its steps of the next one."""
    args, log = run.args, run.log
    run.model.load_state_dict(checkpoint.get("trained", checkpoint["model"]))
    epoch, steps, of = checkpoint["epoch"], checkpoint.get("steps", 0), checkpoint.get("steps_per_epoch", steps_per_epoch)
    place = f"epoch {epoch}" + (f" and {steps} of {of} steps" if steps else "")
    if of != steps_per_epoch:  # another batch, or other data: the same share of the epoch
        steps = steps * steps_per_epoch // of
    if run.average:
        run.average.model.load_state_dict(checkpoint["model"])
        run.average.steps = epoch * steps_per_epoch + steps
    total, last = args.epochs * steps_per_epoch, epoch * steps_per_epoch + steps - 1
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(min(last, total - 1), total, args.lr, args.warmup_steps, args.schedule)
    load_optimizer(run.optimizer, checkpoint["optimizer"], path)
    if args.amp == checkpoint["args"].get("amp") == "fp16":
        run.scaler.load_state_dict(checkpoint["scaler"])
    if "tally" in checkpoint:
        run.tally.load(checkpoint["tally"], run.rank, run.world_size)
        if run.tally.skipped[2] >= args.max_skipped:  # they were about to end the run, which gets another chance
            run.tally.skipped[1:3] = 0
    run.best_miou = checkpoint["best_miou"]
    before = {name: value for name, value in checkpoint["args"].items() if name != "resume"}
    now = {name: value for name, value in vars(args).items() if name != "resume"}
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in now.items() if value != before.get(name)]
    log.line(f"resumed {path} after {place}; changed: {', '.join(changed) or 'nothing'}")
    if (processes := checkpoint.get("world_size", run.world_size)) != run.world_size:
        log.line(
            f"it was trained by {processes} processes, now by {run.world_size}: the result will not be, to the bit, that of a run "
            "without interruption"
        )
    if run.rank == 0 and run.best_miou >= 0 and not (Path(args.out) / "checkpoints" / "best_model.pth").exists():
        log.line("there is no best_model.pth to go with it: the best of what follows will be it")
        run.best_miou = -1.0
    return epoch, steps


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict, path: Path) -> None:
    """The momenta are the checkpoint's, the hyper-parameters those of this run's flags.

    Raises:
        CheckpointError: they are of another network; the fused kernels compare no sizes, and would read beyond them.
    """
    groups = optimizer.state_dict()["param_groups"]
    try:
        optimizer.load_state_dict({**saved, "param_groups": groups})
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: its optimiser's state does not fit ({' '.join(str(error).split())[:200]})") from error
    names = {"momentum_buffer"} if isinstance(optimizer, torch.optim.SGD) else {"step", "exp_avg", "exp_avg_sq"}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = [optimizer.state.get(parameter, {}) for parameter in parameters]
    for number, (parameter, state) in enumerate(zip(parameters, states)):
        expected = {name: () if name == "step" else parameter.shape for name in names if any(states)}  # none without momentum
        if expected != {name: value.shape if isinstance(value, Tensor) else None for name, value in state.items()}:
            raise CheckpointError(
                f"{path}: its optimiser's state of parameter {number} does not fit the network; take another file"
            )


def lost_peer(error: RuntimeError) -> bool:
    """Whether an error of a collective says that another process is gone or does not answer."""
    if isinstance(error, dist.DistError):
        return True
    return bool(re.search("gloo|[Cc]onnection (closed|reset)|[Tt]imed out|timeout|Broken pipe", str(error)))


if __name__ == "__main__":
    sys.exit(exit_status("train.py", main))
