"""Class scores to a loss: reference, public function, schema, fake and autograd of one operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiler import has_kernels

# The loss summed or per pixel; the sum of the weights of what is not ignored; the gradient of the sum of the losses,
# each times its `pixel_grad`, empty if not asked for.
SCHEMA = (
    "(Tensor logits, Tensor target, Tensor? weight, Tensor? pixel_grad, int ignore_index, bool align_corners, "
    "bool per_pixel, bool with_grad) -> (Tensor, Tensor, Tensor)"
)


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
    valid = target != ignore_index
    # On other devices looking at values would wait for the device, and in compiled code it would break the graph.
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = target[valid & ((target < 0) | (target >= logits.shape[1]))]
        if outside.numel():
            expected = f"labels from 0 to {logits.shape[1] - 1} or {ignore_index} (ignore_index)"
            raise RuntimeError(f"target holds {outside[0].item()}, expected {expected}")
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
    total = valid.sum() if weight is None else (weight[target.where(valid, 0)] * valid).sum()
    return _mean(loss, total.to(loss.dtype))


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
    """Cross-entropy of bilinearly resized class scores; differentiable in `logits`, once.

    `F.cross_entropy(F.interpolate(logits, target.shape[-2:], mode="bilinear"), target, ...)`, with two differences:
    where every pixel is ignored, the mean is 0 with zero gradients (PyTorch: NaN), and float16 and bfloat16 logits give
    a float32 loss. The kernels' results are the same in every run, whatever the number of threads. Float64 and label
    smoothing run in the reference.

    Args:
        logits: (N, C, h, w) floating point of any strides.
        target: (N, H, W) uint8 or int64, each a class in [0, C) or `ignore_index`.
        ignore_index: label of pixels that count neither in the loss nor in the mean.
        weight: (C,) weight of each class, of the dtype of the loss, or None for 1; not differentiated.
        label_smoothing: share in [0, 1] of the target that is spread evenly over the classes.
        reduction: "mean" over what is not ignored (weighted by `weight`), "sum", or "none" for one loss per pixel.
        align_corners: as in `F.interpolate`.

    Returns:
        A scalar, or (N, H, W) with reduction "none", 0 at ignored pixels.

    Raises:
        ValueError: wrong rank, dtype, batch size, device, number of weights or reduction.
        RuntimeError: a label outside the range. Not on CUDA, where to look would be to wait for the device: there the
            loss is NaN and the kernel prints the label.
    """
    _check(logits, target, weight, reduction)
    # Where the image shrinks, a kernel that goes over all cells has more to do on the CPU than plain PyTorch.
    shrinks = logits.device.type == "cpu" and target.shape[1:].numel() < logits.shape[2:].numel()
    if shrinks or label_smoothing or logits.dtype == torch.float64 or not has_kernels(logits.device.type):
        return upsample_cross_entropy_reference(
            logits,
            target,
            ignore_index=ignore_index,
            weight=weight,
            label_smoothing=label_smoothing,
            reduction=reduction,
            align_corners=align_corners,
        )
    per_pixel = reduction == "none"
    # The gradient of the summed loss is taken on the way, while the softmax is at hand.
    with_grad = not per_pixel and torch.is_grad_enabled() and logits.requires_grad
    loss, total, _ = torch.ops.ops_ext.upsample_cross_entropy(
        logits.float(), target, weight, None, ignore_index, align_corners, per_pixel, with_grad
    )
    return _mean(loss, total) if reduction == "mean" else loss


def _check(logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> None:
    if logits.ndim != 4 or not logits.is_floating_point() or logits.numel() == 0:
        raise ValueError(
            f"logits are {logits.dtype} {tuple(logits.shape)}, expected floating point (N, C, h, w), not empty"
        )
    if target.dtype not in (torch.uint8, torch.int64):
        raise ValueError(f"target is {target.dtype}, expected uint8 or int64")
    if target.ndim != 3 or target.shape[0] != logits.shape[0] or target.numel() == 0:
        raise ValueError(f"target has shape {tuple(target.shape)}, expected ({logits.shape[0]}, H, W) like the logits")
    if weight is not None:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        if weight.shape != (logits.shape[1],) or weight.dtype != dtype:
            expected = f"{dtype} ({logits.shape[1]},), one per class"
            raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}, expected {expected}")
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {logits.device} like the logits")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}, expected mean, sum or none")


def _mean(loss: Tensor, total: Tensor) -> Tensor:
    return loss / total.where(total != 0, torch.finfo(loss.dtype).tiny)  # 0 / tiny = 0 where all is ignored


torch.library.define("ops_ext::upsample_cross_entropy", SCHEMA)


@torch.library.register_fake("ops_ext::upsample_cross_entropy")
def _fake(logits, target, weight, pixel_grad, ignore_index, align_corners, per_pixel, with_grad):
    loss = logits.new_empty(target.shape if per_pixel else ())
    return loss, logits.new_empty(()), torch.empty_like(logits) if with_grad else logits.new_empty(0)


def _setup_context(ctx, inputs, output):
    logits, target, weight, _, ctx.ignore_index, ctx.align_corners, _, with_grad = inputs
    _, total, grad = output
    ctx.mark_non_differentiable(total, grad)
    ctx.save_for_backward(*([grad] if with_grad else [logits, target, weight]))


def _backward(ctx, loss_grad, _total_grad, _grad_grad):
    if torch.is_grad_enabled():  # by create_graph=True; the second derivative would silently lack this loss's part
        raise RuntimeError(
            "upsample_cross_entropy is differentiable once; for more take upsample_cross_entropy_reference"
        )
    if len(ctx.saved_tensors) == 1:
        grad = ctx.saved_tensors[0] * loss_grad
    else:
        logits, target, weight = ctx.saved_tensors
        pixel_grad = loss_grad.expand(target.shape).contiguous()
        *_, grad = torch.ops.ops_ext.upsample_cross_entropy(
            logits, target, weight, pixel_grad, ctx.ignore_index, ctx.align_corners, False, True
        )
    return grad, None, None, None, None, None, None, None


torch.library.register_autograd("ops_ext::upsample_cross_entropy", _backward, setup_context=_setup_context)
