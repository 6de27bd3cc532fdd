"""The operations around the network: class scores to label maps, class scores to a loss, label maps to a confusion matrix.

Each is stated as its plain PyTorch one-liner, and `x_reference` is that one-liner. `implementations()` says which
implementation runs on this machine; today each op is its reference, on any device that PyTorch has.

This folder needs torch alone, and may be copied into another project as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "accelerate",
    "confusion_matrix",
    "confusion_matrix_reference",
    "implementations",
    "upsample_argmax",
    "upsample_argmax_reference",
    "upsample_cross_entropy",
    "upsample_cross_entropy_reference",
]

MAX_CLASSES = 256  # label maps are uint8
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def implementations() -> dict[str, str]:
    """What runs each op on this machine: op name -> "cpu", "cuda" (a compiled kernel) or "reference" (plain PyTorch)."""
    return {op: "reference" for op in ("upsample_argmax", "upsample_cross_entropy", "confusion_matrix")}


# -------------------------------------------------------------------------------------------------------- upsample_argmax


def upsample_argmax_reference(logits: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """`upsample_argmax` in plain PyTorch."""
    # In channels_last a pixel's scores lie side by side, where argmax is several times faster on the CPU.
    logits = logits.contiguous(memory_format=torch.channels_last)
    scores = F.interpolate(logits, tuple(size), mode="bilinear", align_corners=align_corners)
    return scores.argmax(1).to(torch.uint8)


def upsample_argmax(logits: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Label map of bilinearly resized class scores.

    `F.interpolate(logits, size, mode="bilinear", align_corners=align_corners).argmax(1)`

    Args:
        logits: (N, C, h, w) floating point, C <= 256.
        size: (H, W) of the result in pixels.
        align_corners: as in `F.interpolate`.

    Returns:
        (N, H, W) uint8; of equal scores the first class wins.

    Raises:
        ValueError: wrong rank, dtype, class count or size.
    """
    _check_logits(logits)
    if logits.shape[1] > MAX_CLASSES:
        raise ValueError(f"logits have {logits.shape[1]} classes, expected at most {MAX_CLASSES}: labels are uint8")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size is {tuple(size)}, expected (height, width) of at least 1 pixel each")
    return upsample_argmax_reference(logits, size, align_corners)


# ------------------------------------------------------------------------------------------------- upsample_cross_entropy


def upsample_cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = 255,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    align_corners: bool = False,
) -> Tensor:
    """`upsample_cross_entropy` in plain PyTorch."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    target = target.long()
    scores = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=align_corners)
    loss = F.cross_entropy(
        scores,
        target,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none" if reduction == "none" else "sum",
    )
    if reduction != "mean":
        return loss
    valid = target != ignore_index
    total = valid.sum() if weight is None else (weight[target.where(valid, 0)] * valid).sum()
    return loss / total.to(loss.dtype).clamp(min=torch.finfo(loss.dtype).tiny)  # 0 / tiny = 0 where all is ignored


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = 255,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    align_corners: bool = False,
) -> Tensor:
    """Cross-entropy of bilinearly resized class scores; differentiable in `logits`.

    `F.cross_entropy(F.interpolate(logits, target.shape[-2:], mode="bilinear"), target, ...)`, with two differences: where
    every pixel is ignored, the mean is 0 with zero gradients (PyTorch: NaN), and float16 and bfloat16 logits give a
    float32 loss.

    Args:
        logits: (N, C, h, w) floating point.
        target: (N, H, W) uint8 or int64, each a class in [0, C) or `ignore_index`.
        ignore_index: label of pixels that count neither in the loss nor in the mean.
        weight: (C,) weight of each class, of the dtype of the loss, or None for 1.
        label_smoothing: share in [0, 1] of the target that is spread evenly over the classes.
        reduction: "mean" over what is not ignored (weighted by `weight`), "sum", or "none" for one loss per pixel.
        align_corners: as in `F.interpolate`.

    Returns:
        A scalar, or (N, H, W) with reduction "none", 0 at ignored pixels.

    Raises:
        ValueError: wrong rank, dtype, batch size, number of weights or reduction.
    """
    _check_logits(logits)
    _check_labels("target", target)
    if target.ndim != 3 or target.shape[0] != logits.shape[0] or target.numel() == 0:
        raise ValueError(f"target has shape {tuple(target.shape)}, expected ({logits.shape[0]}, H, W) like the logits")
    if weight is not None and weight.shape != (logits.shape[1],):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected ({logits.shape[1]},), one per class")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}, expected mean, sum or none")
    return upsample_cross_entropy_reference(
        logits,
        target,
        ignore_index=ignore_index,
        weight=weight,
        label_smoothing=label_smoothing,
        reduction=reduction,
        align_corners=align_corners,
    )


# ------------------------------------------------------------------------------------------------------- confusion_matrix


def confusion_matrix_reference(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """`confusion_matrix` in plain PyTorch."""
    valid = target != ignore_index
    truth, guess = target[valid].long(), prediction[valid].long()
    for name, labels in (("target", truth), ("prediction", guess)):
        outside = labels[(labels < 0) | (labels >= num_classes)]
        if outside.numel():
            raise ValueError(f"{name} holds {outside[0].item()}, expected labels from 0 to {num_classes - 1}")
    return torch.bincount(truth * num_classes + guess, minlength=num_classes**2).view(num_classes, num_classes)


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """How often each true class was predicted as each class.

    Args:
        prediction: label maps of any shape, uint8 or int64, in [0, num_classes) wherever the target is not ignored.
        target: true label maps of the same shape, in [0, num_classes) or `ignore_index`.
        num_classes: number of classes.
        ignore_index: label of pixels that do not count.

    Returns:
        (num_classes, num_classes) int64, rows are the truth, columns the prediction.

    Raises:
        ValueError: shapes that differ, wrong dtype, labels outside the range.
    """
    _check_labels("prediction", prediction)
    _check_labels("target", target)
    if prediction.shape != target.shape:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)}, expected the target's {tuple(target.shape)}")
    return confusion_matrix_reference(prediction, target, num_classes, ignore_index)


# ------------------------------------------------------------------------------------------------------------- deployment


def accelerate(
    model: nn.Module,
    *,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Callable[[Tensor], Tensor]:
    """A copy of a trained network that goes from RGB images to label maps; the network itself is left as it is.

        segment = accelerate(load_weights("best_model.pth"))
        labels = segment(torch.from_numpy(numpy.array(image))[None])[0]

    Args:
        model: a network whose `model(x, upsample=False)` gives class scores at a lower resolution.
        device: where to run; None leaves the model where it is.
        autocast: bfloat16 or float16 for mixed precision; None for float32.
        mean, std: of the training images per channel, in units of 1 (white).

    Returns:
        A function from (N, H, W, 3) uint8 RGB, on any device, to (N, H, W) uint8 labels on `device`.
    """
    device = torch.device(device) if device is not None else next(model.parameters()).device
    model = copy.deepcopy(model).eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    shift = torch.tensor(mean, device=device).view(3, 1, 1) * 255
    scale = 1 / (torch.tensor(std, device=device).view(3, 1, 1) * 255)

    @torch.inference_mode()
    def segment(images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, expected uint8 (N, H, W, 3)")
        pixels = images.to(device).permute(0, 3, 1, 2)  # (N, 3, H, W), channels_last in memory
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            logits = model((pixels.float() - shift) * scale, upsample=False)  # (N, C, H/8, W/8)
        return upsample_argmax(logits.float(), images.shape[1:3])

    return segment


# ----------------------------------------------------------------------------------------------------------------- checks


def _check_logits(logits: Tensor) -> None:
    if logits.ndim != 4 or not logits.is_floating_point() or logits.numel() == 0:
        raise ValueError(f"logits are {logits.dtype} {tuple(logits.shape)}, expected floating point (N, C, h, w), not empty")


def _check_labels(name: str, labels: Tensor) -> None:
    if labels.dtype not in (torch.uint8, torch.int64):
        raise ValueError(f"{name} is {labels.dtype}, expected uint8 or int64")
