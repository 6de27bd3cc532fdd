"""Trains Fast-SCNN.

    torchrun --nproc_per_node=8 train.py --data datasets/cityscapes      # 8 devices of this machine
    python train.py --dataset camvid --data datasets/camvid              # one process
    python train.py --resume auto                                        # continue from the newest checkpoint

The defaults are for Cityscapes, and mean the same on 1, 2, 4 and 8 processes: --batch-size counts the images of
all processes together, and the learning rate is proportional to it. Writes below --out: checkpoints/{epoch}.pth, which
hold all that resuming needs, checkpoints/best_model.pth, logs/train.log for people and logs/metrics.jsonl for programs.

Random numbers depend only on seed, step and, for dropout, rank, so an interrupted run that is resumed gives the same
weights as one without interruption. SIGTERM and Ctrl-C finish the step, save, and exit with status 75.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

from launch import (  # isort: skip
    AMP_DTYPES,
    OneLineParser,
    UsageError,
    available_cpus,
    exit_status,
    has_fused_sgd,
    memory_format,
    start_processes,
    syncs_batch_norm,
)

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data import (
    IGNORE,
    Augmentation,
    DataError,
    SegmentationDataset,
    cache_in_ram,
    label_problem,
    normalise,
    open_dataset,
    train_loader,
)
from eval import confusion_matrix, evaluate, evaluation_loader, metrics, resized
from model import VARIANTS, CheckpointError, FastSCNN, build_from_checkpoint, read_checkpoint
from ops_ext import accelerate, fast_precision, implementations, upsample_cross_entropy

PAPER_BATCH = 12  # batch size that --base-lr refers to
POLY_POWER = 0.9
WARMUP_STEPS = 200  # at most a tenth of the run
MOMENTUM = 0.9
AUX_WEIGHT = 0.4  # of each auxiliary loss, section 4.1
WEIGHT_DECAY = 4e-5
SAVE_SECONDS = 600  # between checkpoints within an epoch
MAX_SKIPPED = 25  # consecutive steps without finite gradients that end the run
UNFINISHED = "unfinished_epoch.pth"  # mid-epoch checkpoint; those at the end of an epoch are {epoch}.pth
STOPPED = 75  # exit status after a signal, once everything is saved: EX_TEMPFAIL, try again

# What --recipe sets for each dataset; flags on the command line take precedence. "paper" is section 4.1. "best" is, for
# CamVid and small custom datasets, what tests/benchmarks/recipes.py measured on CamVid; for Cityscapes, published
# settings: MMSegmentation's batch, rate and photometric distortion, and an average of the weights.
# fmt: off
PAPER = {"batch_size": 12, "base_lr": 0.045, "epochs": 1000, "scale_range": [0.5, 2.0]}
SMALL = {
    "batch_size": 4, "base_lr": 0.27, "epochs": 1000, "scale_range": [0.75, 1.75], "half_resolution": 0.6,
    "class_balance": 0.5, "ema": 0.99, "dropout": 0.0,
}
LARGE = {
    "batch_size": 32, "base_lr": 0.045, "epochs": 1000, "scale_range": [0.5, 2.0],
    "ema": 0.999, "colour_jitter": [0.125, 0.5, 0.5, 0.05],
}
CAMVID_CROP = {"crop_size": [360, 480]}
# fmt: on
RECIPES = {
    "paper": {"cityscapes": PAPER, "camvid": {**PAPER, **CAMVID_CROP}, "folder": PAPER},
    "best": {"cityscapes": LARGE, "camvid": {**SMALL, **CAMVID_CROP}, "folder": SMALL},
}

# --------------------------------------------------------------------------------------------------------- command line


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """For argparse: an int or float from `low` to `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return value

    parse.__name__ = kind.__name__  # shown by argparse in its error
    return parse


def loss_scale(text: str) -> str | float:
    """For argparse: "dynamic", or a number."""
    return text if text == "dynamic" else number(float, 1e-6)(text)


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of train.py."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count, share = number(int, 1), number(float, 0, 1)
    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="cityscapes", help="cityscapes, camvid or folder (default: %(default)s)")
    add("--data", metavar="ROOT", help="the dataset's folder (default: datasets/NAME)")
    add("--split", default="train", help="split to train on, or several joined by + (default: %(default)s)")
    add("--val-split", default="val", help="split to validate on (default: %(default)s)")
    add("--crop-size", type=number(int, 32), nargs=2, default=[512, 1024], metavar=("H", "W"), help="in pixels")
    add("--scale", type=number(float, 0.1, 10), default=1.0, metavar="FACTOR",
        help="resize all images by this, also to evaluate and to predict with the weights (default: %(default)s)")
    add("--scale-range", type=number(float, 0.01, 100), nargs=2, default=[0.5, 2.0], metavar=("MIN", "MAX"),
        help="random resize factor before the crop; narrow it for short runs (default: 0.5 2)")
    add("--colour-jitter", type=share, nargs=4, default=[0.3, 0.0, 0.0, 0.0], metavar=("B", "C", "S", "H"),
        help="random brightness, contrast, saturation and hue, ranges as of ColorJitter (default: 0.3 0 0 0)")
    add("--half-resolution", type=share, default=0.0, metavar="SHARE",
        help="train this share of the epochs, the first ones, at half resolution (default: %(default)s)")
    add("--workers", type=number(int, 0), default=min(4, available_cpus()), metavar="N",
        help="decoding processes per training process; 0 decodes between steps (default: %(default)s)")
    add("--cache", choices=("none", "ram"), default="none",
        help="ram keeps all images decoded, 4 bytes per pixel, in shared memory (default: %(default)s)")

    add = parser.add_argument_group("recipe").add_argument
    add("--recipe", choices=RECIPES, help="preset of flags: the paper's, or the best for the dataset")
    add("--epochs", type=count, default=1000, metavar="N", help="passes over the data (default: %(default)s)")
    add("--batch-size", type=count, default=16, metavar="N",
        help="images per step, of all processes together (default: %(default)s)")
    add("--base-lr", type=number(float, 0), default=0.045, metavar="LR",
        help=f"learning rate for {PAPER_BATCH} images; LR x batch / {PAPER_BATCH} is used (default: %(default)s)")
    add("--dropout", type=share, default=0.1, metavar="P", help="dropout before the last layer (default: %(default)s)")
    add("--class-balance", type=number(float, 0), default=0.0, metavar="POWER",
        help="weight classes by their share of the pixels ** -POWER, such as 0.5; POWER falls to a quarter during the "
        "run (default: %(default)s)")
    add("--ohem", type=number(float, 0, 0.99), default=0.0, metavar="P",
        help="main loss only where the true class has a probability below P, or the hardest sixteenth; 0 is off")
    add("--ema", type=number(float, 0, 0.99999), default=0.0, metavar="DECAY",
        help="validate and save an exponential moving average of the weights; 0 is off (default: %(default)s)")
    add("--sync-bn", action=argparse.BooleanOptionalAction, default=True, help="synchronise batch statistics")
    add("--variant", choices=VARIANTS, default="paper", help="network variant (default: %(default)s)")
    add("--init-weights", metavar="FILE", help="start from this checkpoint; classes are matched by name")
    add("--seed", type=number(int, 0), default=0, metavar="N", help="random seed (default: %(default)s)")

    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cpu, cuda, ... (default: the machine's accelerator, else the CPU)")
    add("--amp", choices=("auto", *AMP_DTYPES), default="auto", help="precision; auto is the fastest of the device")
    add("--loss-scale", type=loss_scale, default="dynamic", metavar="{dynamic,128,...}", help="of fp16")

    add = parser.add_argument_group("output").add_argument
    add("--out", default="runs", metavar="DIR", help="folder of checkpoints and logs (default: %(default)s)")
    add("--resume", metavar="{auto,PATH}", help="continue from the newest checkpoint of --out, or from PATH")
    add("--keep", type=count, default=3, metavar="N", help="checkpoints kept, beside the best (default: %(default)s)")
    add("--val-every", type=count, default=10, metavar="N",
        help="epochs between validations, each with a checkpoint (default: %(default)s)")
    add("--log-every", type=count, default=20, metavar="N", help="steps between log lines (default: %(default)s)")
    add("--tensorboard", action="store_true", help="also write the metrics to DIR/logs for TensorBoard")
    # fmt: on
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the values of its --recipe as defaults; UsageError for values that cannot work."""
    parser = get_args_parser()
    chosen = parser.parse_args(argv)
    if chosen.recipe and chosen.dataset in RECIPES[chosen.recipe]:
        parser.set_defaults(**RECIPES[chosen.recipe][chosen.dataset])
    args = parser.parse_args(argv)
    args.data = args.data or f"datasets/{args.dataset}"
    args.lr = args.base_lr * args.batch_size / PAPER_BATCH
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world_size:
        fitting = [n * world_size for n in (args.batch_size // world_size, args.batch_size // world_size + 1) if n]
        raise UsageError(f"--batch-size {args.batch_size} is no multiple of {world_size} processes; use {fitting}")
    return args


# ----------------------------------------------------------------------------------------------------------------- loss


def learning_rate(step: int, total_steps: int, peak: float) -> float:
    """Poly schedule (section 4.1) with linear warm-up; steps count from 0."""
    warmup_steps = min(WARMUP_STEPS, total_steps // 10)
    warmup = min(1.0, (step + 1) / (warmup_steps + 1))
    return peak * warmup * (1 - step / total_steps) ** POLY_POWER


def segmentation_loss(
    outputs: Tensor | tuple[Tensor, ...],
    target: Tensor,
    align_corners: bool = False,
    world_size: int = 1,
    *,
    class_weights: Tensor | None = None,
    ohem: float = 0.0,
) -> Tensor:
    """This process's part of the loss; the parts of all processes add up to the loss of the global batch.

    Means are over the pixels of all processes, so the loss does not depend on their number. Only the hardest sixteenth
    of `ohem` is that of each process.

    Args:
        outputs: (N, C, h, w) logits of the main head, or a tuple of them and those of the auxiliary heads.
        target: (N, H, W) uint8 train ids.
        align_corners: as in the network.
        world_size: number of processes.
        class_weights: (C,) float32; None for no weights.
        ohem: the main loss is over pixels whose true class has a probability below this; 0 for all pixels.
    """
    main, *aux = outputs if isinstance(outputs, tuple) else (outputs,)
    options = {"ignore_index": IGNORE, "weight": class_weights, "align_corners": align_corners}
    labelled = target != IGNORE
    pixel_weights = labelled
    if class_weights is not None:
        pixel_weights = nn.functional.pad(class_weights, (0, 256 - len(class_weights)))[target.int()]  # 0 where ignored
    totals = [pixel_weights.sum(dtype=torch.float32)]
    if ohem:
        losses = upsample_cross_entropy(main, target, reduction="none", **options)
        unweighted = losses.detach()
        if class_weights is not None:
            unweighted = upsample_cross_entropy(main.detach(), target, reduction="none", **{**options, "weight": None})
        hard = labelled & hard_pixels(unweighted, labelled, ohem)
        main_loss = (losses * hard).sum()
        totals.append((pixel_weights * hard).sum(dtype=torch.float32))
    else:
        main_loss = upsample_cross_entropy(main, target, reduction="sum", **options)
    totals = torch.stack(totals)
    if world_size > 1:
        dist.all_reduce(totals)
    totals = totals.clamp(min=1e-6)
    aux_loss = sum(upsample_cross_entropy(output, target, reduction="sum", **options) for output in aux)
    return main_loss / totals[-1] + AUX_WEIGHT * aux_loss / totals[0]


def hard_pixels(losses: Tensor, labelled: Tensor, probability: float) -> Tensor:
    """(N, H, W) bool: where the true class has at most `probability`, and at least the hardest sixteenth.

    The sixteenth is estimated from every fourth pixel of every fourth row. Does not synchronise with the device.
    """
    sample = losses[:, ::4, ::4].where(labelled[:, ::4, ::4], -1.0).flatten()
    hardest = sample.topk(max(1, sample.numel() // 16), sorted=False).values.min()
    return losses >= hardest.clamp(max=-math.log(probability))


def class_shares(dataset: SegmentationDataset, all_samples: bool = True, every_class: bool = False) -> Tensor:
    """(C,) float64: share of each class in the labelled pixels of all, or of 20, samples. DataError for bad labels."""
    indices = np.linspace(0, len(dataset) - 1, len(dataset) if all_samples else 20).astype(int).tolist()
    with ThreadPoolExecutor() as pool:
        counts = sum(pool.map(dataset.count_pixels, indices))
    if problem := label_problem(dataset, counts, every_class):
        raise DataError(f"{dataset.samples[0].label.parent}: {problem}")
    return torch.from_numpy(counts[: len(dataset.classes.names)] / counts[:IGNORE].sum())


def class_weights(shares: Tensor, power: float) -> Tensor:
    """(C,) float32: shares to the power of -`power`, with a mean of 1 over all pixels; 0 for a class without pixels."""
    weights = torch.where(shares > 0, shares.clamp(min=1e-12) ** -power, 0.0)
    return (weights / (weights * shares).sum().clamp(min=1e-12)).float()


# --------------------------------------------------------------------------------------------------- optimiser, weights


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """SGD; no weight decay on depthwise kernels (section 4.1), batch normalisation and biases."""
    decayed = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    ids = {id(p) for p in decayed}
    others = [p for p in model.parameters() if id(p) not in ids]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    fused = has_fused_sgd(others[0].device)  # only that one can skip a step without synchronising with the device
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM, fused=fused)
    for parameter in model.parameters():  # a skipped first step would leave them uninitialised
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class MovingAverage:
    """Exponential moving average of a network's parameters and statistics; `model` is the averaged network.

    The decay of step t, counted from 1, is min(decay, t / (t + 9)), so early weights decay quickly.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay, self.steps = decay, 0
        floating = [name for name, value in model.state_dict().items() if value.is_floating_point()]
        self.pairs = [[each.state_dict()[name] for name in floating] for each in (self.model, model)]

    @torch.no_grad()
    def update(self) -> None:
        """Call after each step of the optimiser."""
        self.steps += 1
        torch._foreach_lerp_(*self.pairs, 1 - min(self.decay, self.steps / (self.steps + 9)))


def flatten_running_statistics(model: nn.Module) -> Tensor:
    """Makes the running statistics of all batch normalisation views of one tensor, and returns that."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)]
    places = [(norm, name) for norm in norms for name in ("running_mean", "running_var")]
    parts = [getattr(norm, name) for norm, name in places]
    joined = torch.cat(parts)
    for (norm, name), view in zip(places, joined.split([len(part) for part in parts])):
        setattr(norm, name, view)
    return joined


def init_weights(model: FastSCNN, class_names: Sequence[str], path: str) -> str:
    """Copies the weights of a checkpoint, those of the last layers by class name; returns a line for the log."""
    checkpoint = read_checkpoint(path)
    source = build_from_checkpoint(checkpoint, path)
    if source.args["variant"] != model.args["variant"]:
        raise CheckpointError(f"{path}: is of variant {source.args['variant']}; use --variant {source.args['variant']}")
    assumed = list(class_names) if source.args["num_classes"] == len(class_names) else []  # file without names
    names = checkpoint.get("classes", {}).get("names", assumed)
    rows = [(i, names.index(name)) for i, name in enumerate(class_names) if name in names]
    weights = source.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            layer = name.rpartition(".")[0]
            if name in weights and layer in ("classifier.conv", "aux_detail.conv", "aux_context.conv"):
                for row, source_row in rows:
                    tensor[row] = weights[name][source_row]
            elif name in weights:
                tensor.copy_(weights[name])
    new = [name for name in class_names if name not in names]
    return f"started from {path}; new classes: {', '.join(new) or 'none'}"


# ----------------------------------------------------------------------------------------------------- logs and signals


class Log:
    """Lines for people on stdout and in train.log, records for programs in metrics.jsonl; without a folder none."""

    def __init__(self, folder: Path | None, tensorboard: bool = False):
        self.files, self.board = [], None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            self.files = [open(folder / name, "a", encoding="utf-8") for name in ("train.log", "metrics.jsonl")]
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(folder))

    def line(self, text: str) -> None:
        """One line for people."""
        if self.files:
            print(text, flush=True)
            print(text, file=self.files[0], flush=True)

    def record(self, **fields) -> None:
        """One JSON object for programs."""
        if self.files:
            print(json.dumps(fields), file=self.files[1], flush=True)
        if self.board:
            step = fields.get("step", fields["epoch"])
            for name, value in fields.items():
                if isinstance(value, int | float) and name not in ("epoch", "step"):
                    self.board.add_scalar(f"{fields['kind']}/{name}", value, step)
            self.board.flush()


class Stopped(BaseException):
    """Raised after a signal, once everything is saved; like KeyboardInterrupt, no Exception."""


class Signals:
    """Decides after each step, for all processes: continue, save, or, after SIGTERM or SIGINT, save and stop.

    A second signal exits at once, unless it follows within a second: torchrun passes on the Ctrl-C that the terminal
    has sent already. An all-reduce on the host, during the next step, makes all act after the same step.
    """

    CONTINUE, SAVE, STOP = range(3)

    def __init__(self, rank: int, world_size: int):
        self.rank = rank
        self.group = dist.new_group(backend="gloo") if world_size > 1 else None  # on the host, without the device
        self.received: str | None = None  # name of the signal
        self.received_at = self.saved_at = time.monotonic()
        self.pending: tuple[dist.Work, Tensor] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number: int, _frame) -> None:
        """The signal handler."""
        if self.received is None:
            self.received, self.received_at = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self.received_at > 1:
            os._exit(128 + number)

    def after_step(self) -> int:
        """CONTINUE, SAVE or STOP, the same in every process."""
        if self.group is None:
            return self.request()
        verdict = self.CONTINUE
        if self.pending:
            work, request = self.pending
            work.wait()
            verdict = int(request)
        request = torch.tensor(self.request(), dtype=torch.int32)
        self.pending = (dist.all_reduce(request, dist.ReduceOp.MAX, self.group, async_op=True), request)
        return verdict

    def request(self) -> int:
        """What this process asks for."""
        if self.received:
            return self.STOP
        if self.rank == 0 and time.monotonic() - self.saved_at >= SAVE_SECONDS:
            self.saved_at = time.monotonic()
            return self.SAVE
        return self.CONTINUE


# -------------------------------------------------------------------------------------------------------------- the run


class Run:
    """State of a training in one process: data, network, optimiser.

    `ddp` is the network, wrapped if there are several processes; `statistics` are the running statistics of its
    batch normalisation; `evaluated` is the network that is validated and saved: the average of --ema, or `model`.
    """

    def __init__(self, args: argparse.Namespace, datasets: Sequence, device: torch.device, rank: int, world_size: int):
        self.args, self.device, self.rank, self.world_size = args, device, rank, world_size
        self.train_set, self.val_set = train_set, val_set = datasets
        self.best_miou, self.skipped_in_a_row, self.class_weights, self.notes = -1.0, 0, None, []
        if args.cache == "ram":
            self.notes.append(cache_in_ram(datasets))
        self.loader = train_loader(
            train_set, args.batch_size, workers=args.workers, seed=args.seed, rank=rank, world_size=world_size
        )
        self.val_loader = evaluation_loader(self.val_set, args.workers, rank, world_size)
        self.steps_per_epoch, self.image_hw = len(self.loader), list(train_set.read(0)[1].shape)
        custom = args.dataset == "folder"  # check every sample before the first step, of known datasets 20
        if rank == 0:
            self.shares = class_shares(train_set, custom or args.class_balance > 0, every_class=custom)
            class_shares(val_set, custom)  # only checks the labels
        self.shares = from_rank_0(self.shares if rank == 0 else None)  # frequencies of the classes in the training set
        names = train_set.classes.names
        torch.manual_seed(args.seed)
        self.model = FastSCNN(len(names), variant=args.variant, aux=True, dropout=args.dropout)
        if args.init_weights:
            self.notes.append(init_weights(self.model, names, args.init_weights))
        self.model.to(device, memory_format=memory_format(device))
        self.syncs_bn = world_size > 1 and args.sync_bn and device.type != "cpu"
        if args.batch_size == world_size and not self.syncs_bn:
            raise UsageError(f"--batch-size {args.batch_size} is one per process, too few for batch normalisation")
        if self.syncs_bn:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)  # before the DDP wrap
        self.statistics = flatten_running_statistics(self.model)
        self.ddp = self.model
        if world_size > 1:
            device_ids = None if device.type == "cpu" else [device.index]
            self.ddp = nn.parallel.DistributedDataParallel(self.model, device_ids, gradient_as_bucket_view=True)
            self.ddp.broadcast_buffers = False  # equal with SyncBatchNorm; else `validate` broadcasts them
        self.average = MovingAverage(self.model, args.ema) if args.ema else None
        self.evaluated = self.average.model if self.average else self.model
        self.optimizer = make_optimizer(self.model, args.lr)
        if args.amp == "auto":
            precision = fast_precision(device)
            if self.syncs_bn and not syncs_batch_norm(device, precision):
                precision = torch.float16
            args.amp = next((name for name, dtype in AMP_DTYPES.items() if dtype == precision), "off")
        # In bf16 and float32 the scaler only skips steps; None where the scale follows the gradients.
        self.fixed_scale = 1.0 if args.amp != "fp16" else None if args.loss_scale == "dynamic" else args.loss_scale
        self.scaler = torch.amp.GradScaler(device.type, init_scale=self.fixed_scale or 65536.0)

    def description(self) -> list[str]:
        """The first lines of the log: code, flags, device, batch, data."""
        args, share = self.args, self.args.batch_size // self.world_size
        shared = len({*self.train_set.samples} & {*self.val_set.samples})
        rate = f"{args.base_lr} x {args.batch_size} / {PAPER_BATCH} = {args.lr:.5f}"
        ends = (f"{s[0].image.name} to {s[-1].image.name}" for s in (self.train_set.samples, self.val_set.samples))
        lines = [
            f"code {git_revision()}  torch {torch.__version__}  " + " ".join(f"{k}={v}" for k, v in vars(args).items()),
            f"device {self.device}  precision {args.amp}  ops {implementations(self.device)}",
            f"batch {args.batch_size} = {share} x {self.world_size} processes  learning rate {rate}",
            f"{len(self.train_set)} images to train, {len(self.val_set)} to validate, {shared} of them in both  "
            f"{self.steps_per_epoch} steps x {args.epochs} epochs  {', '.join(ends)}",
        ]
        shown = math.prod(args.crop_size) / (args.scale**2 * math.prod(self.image_hw))
        if shown < 0.2:
            scale = math.sqrt(math.prod(args.crop_size) / math.prod(self.image_hw))
            lines.append(f"a crop shows {shown:.0%} of an image: add --scale {scale:.2g} to see nearly all of it")
        if self.world_size > 1 and not self.syncs_bn:
            lines.append(f"no SyncBatchNorm: each process normalises over its own {share} images")
        return [*lines, *self.notes]


def open_datasets(args: argparse.Namespace) -> tuple[SegmentationDataset, SegmentationDataset]:
    """The splits to train on and to validate on."""
    brightness, contrast, saturation, hue = args.colour_jitter
    augmentation = Augmentation(
        tuple(args.crop_size),
        tuple(args.scale * factor for factor in sorted(args.scale_range)),
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=360 * hue,  # degrees
        half_epochs=round(args.half_resolution * args.epochs),
        seed=args.seed,
    )
    train_set = open_dataset(args.dataset, args.data, args.split, augmentation)
    return train_set, open_dataset(args.dataset, args.data, args.val_split)


def from_rank_0(value: object) -> object:
    """Rank 0's value, in every process."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, 0)
    return values[0]


def git_revision() -> str:
    """The commit of this code, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=10"]
    with contextlib.suppress(OSError):  # no git
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"


def keep_freed_memory() -> None:
    """Keeps freed memory in glibc for the next step, instead of returning it to the kernel.

    On the CPU each large tensor is otherwise mapped, zeroed and unmapped again, a quarter of a step's time.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD, never


# ------------------------------------------------------------------------------------------------------- step and epoch


def train_step(run: Run, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the optimiser, without synchronising with the device.

    `images` (N, H, W, 3) uint8 RGB and `target` (N, H, W) uint8 are this process's share of the batch. Returns its part
    of the loss, and () bool, whether the gradients were finite. If not, the step is skipped: weights and statistics of
    batch normalisation are unchanged.
    """
    dtype = AMP_DTYPES[run.args.amp]
    images, target = (each.to(run.device, non_blocking=True) for each in (images, target))
    statistics = run.statistics.clone()
    with torch.autocast(run.device.type, dtype, enabled=dtype is not None):
        outputs = run.ddp(normalise(images), upsample=False)
    options = {"class_weights": run.class_weights, "ohem": run.args.ohem}
    loss = segmentation_loss(outputs, target, run.model.align_corners, run.world_size, **options)
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss * run.world_size).backward()  # DDP averages over the processes, where the loss is a sum
    gradients = [parameter.grad for parameter in run.model.parameters() if parameter.grad is not None]
    finite = torch.nn.utils.get_total_norm(gradients).isfinite()  # the same in all processes, as the gradients are
    run.scaler.step(run.optimizer)  # skipped if a gradient is not finite
    run.scaler.update(run.fixed_scale)
    torch.where(finite, run.statistics, statistics, out=run.statistics)
    if run.average:
        run.average.update()
    return loss.detach(), finite


def train_one_epoch(run: Run, epoch: int, first: int, log: Log, signals: Signals) -> int:
    """One pass over the loader, starting at batch `first`; epochs count from 1.

    Returns what `Signals.after_step` says after the last step. Raises Stopped where it asks for that earlier.
    """
    args, steps_per_epoch = run.args, run.steps_per_epoch
    run.ddp.train()
    run.loader.batch_sampler.set_epoch(epoch, first)
    if args.class_balance:
        power = args.class_balance * (1 - 0.75 * (epoch - 1) / max(1, args.epochs - 1))
        run.class_weights = class_weights(run.shares, power).to(run.device)
    step, total_steps = (epoch - 1) * steps_per_epoch + first, args.epochs * steps_per_epoch
    results, logged_at = [], time.perf_counter()
    for images, target in run.loader:
        lr = learning_rate(step, total_steps, args.lr)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        # For dropout: a seed for each step, so that a resumed run draws the same numbers.
        torch.manual_seed(int(np.random.SeedSequence((args.seed, step, run.rank)).generate_state(1)[0]))
        results.append(torch.stack(train_step(run, images, target)))
        step += 1
        last = step == epoch * steps_per_epoch
        if step % args.log_every == 0 or last:
            log_steps(run, epoch, step, results, time.perf_counter() - logged_at, log)
            results, logged_at = [], time.perf_counter()
        verdict = signals.after_step()
        if verdict != Signals.CONTINUE and not last:
            save_training(run, epoch - 1, step - (epoch - 1) * steps_per_epoch)
            if verdict == Signals.STOP:
                raise Stopped
    return verdict


def log_steps(run: Run, epoch: int, step: int, results: list[Tensor], seconds: float, log: Log) -> None:
    """Logs the steps since the last line, up to `step`; `results` are what `train_step` returned, a tensor for each.

    Raises UsageError if the last MAX_SKIPPED steps, or more, were skipped.
    """
    args, count, steps_per_epoch = run.args, len(results), run.steps_per_epoch
    loss, finite = torch.stack(results).unbind(1)
    total = loss.where(finite > 0, 0).sum()
    if run.world_size > 1:
        dist.all_reduce(total)
    skipped = count - int(finite.sum())
    mean_loss = total.item() / (count - skipped) if skipped < count else None
    for each in finite.tolist():
        run.skipped_in_a_row = 0 if each else run.skipped_in_a_row + 1
    lr = run.optimizer.param_groups[0]["lr"]
    images_per_s = count * args.batch_size / seconds
    # A step at half resolution is a quarter of the work.
    half_steps, total_steps = run.train_set.augmentation.half_epochs * steps_per_epoch, args.epochs * steps_per_epoch
    before, now, end = (s - 0.75 * min(s, half_steps) for s in (step - count, step, total_steps))
    left = timedelta(seconds=round(seconds * (end - now) / (now - before)))
    log.line(
        f"epoch {epoch}/{args.epochs}  step {step}/{total_steps}  "
        f"loss {math.nan if mean_loss is None else mean_loss:.4f}  lr {lr:.5f}  "
        f"{images_per_s:.1f} images/s  left {left}" + (f"  skipped {skipped} steps" if skipped else "")
    )
    figures = {"loss": mean_loss, "lr": lr, "images_per_s": images_per_s, "seconds": seconds, "skipped": skipped}
    log.record(kind="train", epoch=epoch, step=step, **figures)
    if run.skipped_in_a_row >= MAX_SKIPPED:
        raise UsageError(
            f"no finite gradients in {run.skipped_in_a_row} steps in a row, up to step {step} in epoch {epoch}; use a "
            "lower --base-lr or --amp off; --resume auto continues from the newest checkpoint"
        )


def finish_epoch(run: Run, epoch: int, log: Log, signals: Signals, verdict: int = Signals.CONTINUE) -> None:
    """If it is due: saves {epoch}.pth, validates, and writes best_model.pth if it is the best.

    The checkpoint comes first and says that validation is missing, so a resumed run makes up for it.
    """
    args = run.args
    due = epoch % args.val_every == 0 or epoch == args.epochs
    if due or verdict != Signals.CONTINUE:
        save_training(run, epoch, validated=not due)
    if verdict == Signals.STOP:
        raise Stopped
    if not due:
        return
    result = validate(run, signals)
    log.line(f"epoch {epoch}/{args.epochs}  mIoU {result['miou']:.4f}  pixel accuracy {result['pixel_accuracy']:.4f}")
    log.record(kind="val", epoch=epoch, **result)
    if result["miou"] > run.best_miou:
        run.best_miou = result["miou"]
        if run.rank == 0:
            save({**network_state(run, epoch), "miou": run.best_miou}, checkpoint_folder(args) / "best_model.pth")
    save_training(run, epoch)


def validate(run: Run, signals: Signals) -> dict:
    """Metrics of the validation split, computed by all processes. Raises Stopped after a signal."""
    args, classes = run.args, run.val_set.classes
    if run.world_size > 1 and not run.syncs_bn:  # use rank 0's statistics, which are saved
        for buffer in run.evaluated.buffers():
            dist.broadcast(buffer, 0)
    segment = accelerate(run.evaluated, device=run.device, precision=AMP_DTYPES[args.amp] or torch.float32)
    confusion = torch.zeros(len(classes.names), len(classes.names), dtype=torch.int64, device=run.device)
    for _, _, label, prediction in evaluate(resized(segment, args.scale), run.val_loader):
        confusion += confusion_matrix(prediction, label, len(classes.names))
        if signals.received:
            break
    signals.after_step()  # of two calls, the second returns what the processes asked for at the first
    if signals.after_step() == Signals.STOP:
        raise Stopped
    if run.world_size > 1:
        dist.all_reduce(confusion)
    return metrics(confusion, classes)


# -------------------------------------------------------------------------------------------------- checkpoints, resume


def checkpoint_folder(args: argparse.Namespace) -> Path:
    """Where the checkpoints of a run are."""
    return Path(args.out) / "checkpoints"


def saved_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that can be resumed, oldest first: {epoch}.pth, then the one within an epoch."""
    numbered = sorted((path for path in folder.glob("*.pth") if path.stem.isdecimal()), key=lambda path: int(path.stem))
    return [*numbered, *folder.glob(UNFINISHED)]


def network_state(run: Run, epoch: int) -> dict:
    """What every checkpoint holds: the network, how to build it, its classes, size and scale of the training images."""
    return {
        "model": run.evaluated.state_dict(),
        "model_args": run.model.args,
        "classes": run.val_set.classes.to_dict(),
        "image_hw": [round(run.args.scale * side) for side in run.image_hw],
        "scale": run.args.scale,
        "epoch": epoch,
        "args": vars(run.args),
    }


def save_training(run: Run, epoch: int, steps: int = 0, validated: bool = True) -> None:
    """Saves all that resuming needs after `epoch` epochs and `steps` of the next one. All processes call this."""
    if run.rank == 0:
        state = {
            **network_state(run, epoch),
            "steps": steps,
            "steps_per_epoch": run.steps_per_epoch,
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "best_miou": run.best_miou,
            "validated": validated,
            "world_size": run.world_size,
        }
        if run.average:
            state["trained"] = run.model.state_dict()  # "model" holds the average
        folder = checkpoint_folder(run.args)
        save(state, folder / (UNFINISHED if steps else f"{epoch}.pth"))
        if not steps:
            (folder / UNFINISHED).unlink(missing_ok=True)
        for path in saved_checkpoints(folder)[: -run.args.keep]:
            path.unlink()
    if run.world_size > 1:
        dist.barrier()  # if a rank exited early, torchrun would kill rank 0 while it writes


def save(checkpoint: dict, path: Path) -> None:
    """Writes a temporary file and renames it, so `path` is always complete."""
    temporary = path.with_name(".checkpoint.tmp")  # one name: killed runs leave at most one
    content = io.BytesIO()
    torch.save(checkpoint, content)
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def find_checkpoint(args: argparse.Namespace) -> tuple[Path | None, dict | None, list[str]]:
    """Path and content of the checkpoint to resume, None if the run starts from scratch, and lines for the log.

    Raises UsageError for checkpoints of another run in --out, FileNotFoundError or CheckpointError if none is usable.
    """
    found, notes = saved_checkpoints(checkpoint_folder(args)), []
    if args.resume != "auto":
        path = Path(args.resume) if args.resume else None
        if found and (path is None or path.resolve() != found[-1].resolve()):
            raise UsageError(f"{found[-1]} already exists: use --resume auto, or another --out for a new run")
        found = [path] if path else []
    for path in reversed(found):
        try:
            state = read_training_state(path)
        except CheckpointError as error:
            if path == found[0]:
                raise
            notes.append(f"skipped {error}")
            continue
        if not (checkpoint_folder(args) / "best_model.pth").exists():  # another --out, or deleted: validate again
            state |= {"best_miou": -1.0, "validated": state["steps"] > 0}
        return path, state, notes
    return None, None, [f"nothing to resume in {args.out}: starting from scratch"] if args.resume else []


def read_training_state(path: Path) -> dict:
    """A checkpoint with all that resuming needs. Raises FileNotFoundError or CheckpointError."""
    checkpoint = read_checkpoint(path)
    if not {"optimizer", "scaler", "steps_per_epoch", "world_size", "args", "classes"} <= checkpoint.keys():
        raise CheckpointError(f"{path}: holds only weights; use a numbered checkpoint, or --init-weights")
    return checkpoint


def resume(run: Run, path: Path, checkpoint: dict, log: Log) -> tuple[int, int]:
    """Restores a run; returns its complete epochs and the steps of the next one."""
    args = run.args
    if checkpoint["model_args"] != run.model.args:
        raise CheckpointError(f"{path}: holds the network {checkpoint['model_args']}, this run has {run.model.args}")
    if checkpoint["classes"]["names"] != list(run.val_set.classes.names):
        raise CheckpointError(f"{path}: was trained on other classes; resume on its own dataset, or use --init-weights")
    if ("trained" in checkpoint) != bool(run.average):
        raise CheckpointError(f"{path}: was trained with --ema {checkpoint['args']['ema']}; use the same")
    run.model.load_state_dict(checkpoint.get("trained", checkpoint["model"]))
    load_optimizer(run.optimizer, checkpoint["optimizer"], path)
    epoch, steps_per_epoch = checkpoint["epoch"], run.steps_per_epoch
    steps = checkpoint["steps"] * steps_per_epoch // checkpoint["steps_per_epoch"]  # the same share of the epoch
    if run.average:
        run.average.model.load_state_dict(checkpoint["model"])
        run.average.steps = epoch * steps_per_epoch + steps
    if args.amp == checkpoint["args"]["amp"] == "fp16":
        run.scaler.load_state_dict(checkpoint["scaler"])
    run.best_miou = checkpoint["best_miou"]
    before = {**checkpoint["args"], "world_size": checkpoint["world_size"], "resume": args.resume}
    now = {**vars(args), "world_size": run.world_size}
    changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now if now[name] != before.get(name)]
    place = f"epoch {epoch}" + (f" and {steps} of {steps_per_epoch} steps" if steps else "")
    log.line(f"resumed {path} after {place}; changed: {', '.join(changed) or 'nothing'}")
    return epoch, steps


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict, path: Path) -> None:
    """Loads the momenta and checks their shapes, as fused kernels do not; keeps this run's hyper-parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        optimizer.load_state_dict({**saved, "param_groups": optimizer.state_dict()["param_groups"]})
        fits = all(optimizer.state[each]["momentum_buffer"].shape == each.shape for each in parameters)
    except (AttributeError, KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise CheckpointError(f"{path}: its optimiser state does not fit this network; use another checkpoint")


# ----------------------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> int:
    """Trains, and returns the exit status: 0, or STOPPED after a signal."""
    args = parse_args(argv)
    datasets = open_datasets(args)
    device, rank, world_size = start_processes(args.device)
    path, checkpoint, resume_notes = from_rank_0(find_checkpoint(args) if rank == 0 else None)
    if device.type == "cpu":
        keep_freed_memory()
    run = Run(args, datasets, device, rank, world_size)
    checkpoint_folder(args).mkdir(parents=True, exist_ok=True)
    log = Log(Path(args.out) / "logs" if rank == 0 else None, args.tensorboard)
    for note in [*run.description(), *resume_notes]:
        log.line(note)
    epochs_done, first = resume(run, path, checkpoint, log) if checkpoint else (0, 0)
    signals = Signals(rank, world_size)
    try:
        if checkpoint and not checkpoint["validated"]:
            finish_epoch(run, epochs_done, log, signals)
        for epoch in range(epochs_done + 1, args.epochs + 1):
            verdict = train_one_epoch(run, epoch, first, log, signals)
            finish_epoch(run, epoch, log, signals, verdict)
            first = 0
    except Stopped:
        log.line(f"stopped by {signals.received or 'another process'}; everything is saved, --resume auto continues")
        return STOPPED
    log.line(f"done: best mIoU {run.best_miou:.4f}, {checkpoint_folder(args) / 'best_model.pth'}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main, (DataError, CheckpointError)))
