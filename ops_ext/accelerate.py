"""A trained network for deployment: batch normalisation folded, the last step fused, the fastest precision."""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .compiler import has_kernels
from .cuda_graph import Recorded
from .engine import FusedFastSCNN
from .upsample_argmax import upsample_argmax

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def accelerate(
    model: nn.Module,
    *,
    device: torch.device | str | None = None,
    precision: torch.dtype | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Segment:
    """A copy of a trained network that goes from RGB images to label maps; the network itself is left as it is.

        segment = accelerate(load_weights("best_model.pth"))
        labels = segment(torch.from_numpy(numpy.array(image))[None])[0]

    On the CPU model.py's Fast-SCNN runs in kernels of its own, at any size without a compilation. Another network, or
    another device, runs in PyTorch in channels_last; where that is slower than it could be, a warning says why.

    Args:
        model: a network whose `model(x, upsample=False)` gives class scores at a lower resolution, to be upsampled as
            its attribute `align_corners` says, or else without.
        device: where to run; None leaves the model where it is.
        precision: float32, or bfloat16 or float16 for what is multiplied; None for the fastest that loses next to
            nothing, as `fast_precision` says.
        mean, std: of the training images per channel, in units of 1 (white).

    Raises:
        ValueError: a precision that is none of these.
    """
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"precision is {precision}, expected float32, bfloat16, float16 or None")
    device = torch.device(device) if device is not None else next(model.parameters()).device
    model = copy.deepcopy(model).eval().requires_grad_(False).to(device)
    with contextlib.suppress(RuntimeError):  # of a device that has no channels_last
        model.to(memory_format=torch.channels_last)
    fold_batch_norm(model)
    device = next(model.parameters()).device  # "cuda" alone would mean another one once the current device changes
    mean, std = torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)
    run = _in_engine(model, precision, mean, std) if device.type == "cpu" and has_kernels("cpu") else None
    run = run or InPyTorch(model, device, precision or fast_precision(device), mean, std)
    return Segment(run, device)


class Segment:
    """From (N, H, W, 3) uint8 RGB, a tensor or an array, to uint8 labels on `device`, (N, H, W) or of another `size`.

    On CUDA a size that comes twice is recorded as a graph. `precision` is what is multiplied: "fp32", "bf16" or "fp16".
    """

    def __init__(self, run: FusedFastSCNN | InPyTorch, device: torch.device):
        self.run, self.device, self.precision = run, device, PRECISIONS[run.dtype]
        self.labels = Recorded(run) if device.type == "cuda" else run

    @torch.inference_mode()
    def __call__(self, images: Tensor, size: Sequence[int] | None = None) -> Tensor:
        images = torch.as_tensor(images)  # of NumPy, too
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3 or images.numel() == 0:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, expected uint8 (N, H, W, 3), not empty")
        return self.labels(images.to(self.device), tuple(size or images.shape[1:3]))


class InPyTorch:
    """From uint8 images to label maps on their device, by a network in evaluation mode, which is changed."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype, mean: Tensor, std: Tensor):
        self.model, self.dtype = model.to(dtype), dtype
        self.shift, self.scale = (each.view(3, 1, 1).to(device) for each in (mean * 255, 1 / (std * 255)))
        self.align_corners = getattr(model, "align_corners", False)

    def __call__(self, images: Tensor, size: Sequence[int]) -> Tensor:
        return upsample_argmax(self.scores(images), size, self.align_corners)

    def scores(self, images: Tensor) -> Tensor:
        pixels = (images.permute(0, 3, 1, 2) - self.shift) * self.scale  # (N, 3, H, W), channels_last in memory
        return self.model(pixels.to(self.dtype), upsample=False)  # (N, C, H/8, W/8)


def fold_batch_norm(model: nn.Module) -> None:
    """Folds batch normalisation into the convolution before it, within each `nn.Sequential`, in place.

    Args:
        model: a network in evaluation mode.
    """
    for parent in model.modules():
        if not isinstance(parent, nn.Sequential):  # elsewhere neighbours need not be called one after the other
            continue
        for (name, conv), (bn_name, bn) in itertools.pairwise(list(parent.named_children())):
            if (
                type(conv) is nn.Conv2d
                and isinstance(bn, nn.BatchNorm2d | nn.SyncBatchNorm)
                and bn.running_mean is not None
            ):
                setattr(parent, name, fuse_conv_bn_eval(conv, bn))
                setattr(parent, bn_name, nn.Identity())


def fast_precision(device: torch.device) -> torch.dtype:
    """The type that a device multiplies fastest and that loses next to nothing: bfloat16 where there is that."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):  # Turing
        return torch.float16
    return torch.bfloat16


@torch.inference_mode()
def _in_engine(model: nn.Module, precision: torch.dtype | None, mean: Tensor, std: Tensor) -> FusedFastSCNN | None:
    """The network in kernels of its own, if it is a Fast-SCNN as they compute it; else a warning says why."""
    if precision is None:
        precision = torch.bfloat16 if torch.ops.ops_ext.has_fast_bfloat16() else torch.float32
    images = torch.arange(2 * 64 * 96 * 3).mul(7919).bitwise_and(255).byte().view(2, 64, 96, 3)
    pixels = (images.permute(0, 3, 1, 2) / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    try:
        engine = FusedFastSCNN(model, mean, std, precision)
        scores = engine.logits(images)
        # Submodules of these names and sizes may still be put together otherwise: what counts is what comes out.
        expected = model(pixels.contiguous(memory_format=torch.channels_last), upsample=False)
        error = float((scores - expected).norm() / expected.norm())
        if error < (0.05 if precision == torch.bfloat16 else 1e-3):
            return engine
        cause = f"its scores differ from the module's by {error:.2g}"
    except (AttributeError, RuntimeError) as problem:
        cause = str(problem)
    warnings.warn(
        f"ops_ext: the network runs in plain PyTorch, not in the CPU engine, up to 10 times slower. Cause: {cause}",
        RuntimeWarning,
        stacklevel=3,
    )
    return None
