"""The operations around the network: class scores to label maps, class scores to a loss.

Each is stated as its plain PyTorch one-liner, and `x_reference` is that one-liner. On the CPU and on NVIDIA GPUs kernels run
that never write class scores at full resolution; they are compiled on first use, or by `python -m ops_ext`, which needs a C++
compiler (g++ or clang++), for GPUs also nvcc. Where that fails, and on other devices, the reference runs, with the same
results; one warning names the cause. `implementations()` says what runs on this machine.

The kernels trace under `torch.compile` without graph breaks. Under autocast they take logits as they arrive: they compute in
float32 whatever the logits (float64 for float64), so that there is nothing to cast.

This folder needs torch alone, and may be copied into another project as it is.
"""

from __future__ import annotations

import copy
import functools
import os
import threading
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compiler import BuildError, load
from .deployed import Recorded, fold_batch_norm
from .fused import FusedFastSCNN, median_ms

__all__ = [
    "accelerate",
    "fast_precision",
    "implementations",
    "upsample_argmax",
    "upsample_argmax_reference",
    "upsample_cross_entropy",
    "upsample_cross_entropy_reference",
]

MAX_CLASSES = 256  # label maps are uint8
LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def implementations(device: torch.device | str | None = None) -> dict[str, str]:
    """What runs each op on this machine: op name -> "cpu", "cuda" (a compiled kernel) or "reference" (plain PyTorch).

    Compiles the kernels if that has not been done before.

    Args:
        device: the device in question; None for the accelerator where there is one, else the CPU.
    """
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device_type = torch.device(device).type
    name = device_type if _compiled(device_type) else "reference"
    return dict.fromkeys(("upsample_argmax", "upsample_cross_entropy"), name)


# ---------------------------------------------------------------------------------------------------- loading the kernels

_loading = threading.Lock()


@torch.compiler.assume_constant_result
def _compiled(device_type: str) -> bool:
    """Whether the kernels for this type of device are there, after an attempt to get them."""
    if device_type not in ("cpu", "cuda"):
        return False
    with _loading:
        return _load("cpu") and (device_type == "cpu" or _load(device_type))


@functools.cache
def _load(backend: str) -> bool:
    try:
        if backend == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (7, 5):
            raise BuildError(f"{torch.cuda.get_device_name()} is older than Turing (compute capability 7.5)")
        first = load(backend)
    except BuildError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once, not once for each process of torchrun
            message = f"ops_ext: no compiled {backend} kernels; plain PyTorch runs instead, slower. Cause: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=4)
        return False
    if first and backend == "cpu":  # which brings the schemas
        torch.library.register_fake("ops_ext::upsample_argmax", _argmax_fake)
        torch.library.register_fake("ops_ext::upsample_cross_entropy", _cross_entropy_fake)
        torch.library.register_fake("ops_ext::upsample_cross_entropy_backward", _cross_entropy_backward_fake)
        torch.library.register_autograd(
            "ops_ext::upsample_cross_entropy", _cross_entropy_backward, setup_context=_cross_entropy_context
        )
    return True


# -------------------------------------------------------------------------------------------------------- upsample_argmax


def upsample_argmax_reference(logits: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """`upsample_argmax` in plain PyTorch."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()  # in half precision many scores would round to a tie
    # In channels_last a pixel's scores lie side by side, where argmax is several times faster on the CPU.
    logits = logits.contiguous(memory_format=torch.channels_last)
    scores = F.interpolate(logits, tuple(size), mode="bilinear", align_corners=align_corners)
    return scores.argmax(1).to(torch.uint8)


def upsample_argmax(logits: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Label map of bilinearly resized class scores.

    `F.interpolate(logits, size, mode="bilinear", align_corners=align_corners).argmax(1)`, computed in float32 where the logits
    are float16 or bfloat16.

    Args:
        logits: (N, C, h, w) float32, bfloat16, float16 or float64 of any strides, C <= 256.
        size: (H, W) of the result in pixels.
        align_corners: as in `F.interpolate`.

    Returns:
        (N, H, W) uint8. Of equal scores the first class wins; NaN wins over numbers, as in `torch.argmax`. Where the two best
        scores differ by less than rounding, either may be named.

    Raises:
        ValueError: wrong rank, dtype, class count or size.
    """
    _check_logits(logits)
    if logits.shape[1] > MAX_CLASSES:
        raise ValueError(f"logits have {logits.shape[1]} classes, expected at most {MAX_CLASSES}: labels are uint8")
    if not isinstance(size, (tuple, list)) or len(size) != 2 or min(size) < 1:
        raise ValueError(f"size is {size}, expected (height, width) of at least 1 pixel each")
    if not _compiled(logits.device.type):
        return upsample_argmax_reference(logits, size, align_corners)
    return torch.ops.ops_ext.upsample_argmax(logits, size[0], size[1], align_corners)


def _argmax_fake(logits, height, width, align_corners):
    return logits.new_empty((logits.shape[0], height, width), dtype=torch.uint8)


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
    valid = target != ignore_index
    # On other devices looking at values would wait for the device, and in compiled code it would break the graph.
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range("target", target[valid], logits.shape[1], f" or {ignore_index} (ignore_index)")
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

    `F.cross_entropy(F.interpolate(logits, target.shape[-2:], mode="bilinear"), target, ...)`, with two differences: where
    every pixel is ignored, the mean is 0 with zero gradients (PyTorch: NaN), and float16 and bfloat16 logits give a
    float32 loss. The kernels' results are the same in every run, whatever the number of threads.

    Args:
        logits: (N, C, h, w) float32, bfloat16, float16 or float64 of any strides.
        target: (N, H, W) uint8 or int64, each a class in [0, C) or `ignore_index`.
        ignore_index: label of pixels that count neither in the loss nor in the mean.
        weight: (C,) weight of each class, of the dtype of the loss, or None for 1; not differentiated.
        label_smoothing: share in [0, 1] of the target that is spread evenly over the classes.
        reduction: "mean" over what is not ignored (weighted by `weight`), "sum", or "none" for one loss per pixel.
        align_corners: as in `F.interpolate`.

    Returns:
        A scalar, or (N, H, W) with reduction "none", 0 at ignored pixels.

    Raises:
        ValueError: wrong rank, dtype, batch size, device, number of weights, smoothing or reduction.
        RuntimeError: a label outside the range. Not on CUDA, where to look would be to wait for the device: there the loss
            is NaN and the kernel prints the label.
    """
    _check_logits(logits)
    _check_labels("target", target)
    if target.ndim != 3 or target.shape[0] != logits.shape[0] or target.numel() == 0:
        raise ValueError(f"target has shape {tuple(target.shape)}, expected ({logits.shape[0]}, H, W) like the logits")
    _check_device("target", target, "logits", logits)
    if weight is not None:
        if weight.shape != (logits.shape[1],):
            raise ValueError(f"weight has shape {tuple(weight.shape)}, expected ({logits.shape[1]},), one per class")
        if weight.dtype != _loss_dtype(logits):
            raise ValueError(f"weight is {weight.dtype}, expected {_loss_dtype(logits)} like the loss")
        _check_device("weight", weight, "logits", logits)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected a share from 0 to 1")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}, expected mean, sum or none")
    # Where the image shrinks, a kernel that goes over all cells has more to do on the CPU than plain PyTorch.
    shrinks = target.shape[1] * target.shape[2] < logits.shape[2] * logits.shape[3]
    if not _compiled(logits.device.type) or (shrinks and logits.device.type == "cpu"):
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
        logits, target, weight, ignore_index, label_smoothing, align_corners, per_pixel, with_grad
    )
    return _mean(loss, total) if reduction == "mean" else loss


def _mean(loss: Tensor, total: Tensor) -> Tensor:
    return loss / total.where(total != 0, torch.finfo(loss.dtype).tiny)  # 0 / tiny = 0 where all is ignored


def _loss_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _gradient_fake(logits):
    channels_last = not logits.is_contiguous() and logits.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(logits.shape, dtype=_loss_dtype(logits), device=logits.device, memory_format=memory_format)


def _cross_entropy_fake(logits, target, weight, ignore_index, label_smoothing, align_corners, per_pixel, with_grad):
    dtype = _loss_dtype(logits)
    loss = logits.new_empty(target.shape if per_pixel else (), dtype=dtype)
    grad = _gradient_fake(logits) if with_grad else logits.new_empty((0,), dtype=dtype)
    return loss, logits.new_empty((), dtype=dtype), grad


def _cross_entropy_backward_fake(pixel_grad, logits, target, weight, ignore_index, label_smoothing, align_corners):
    return _gradient_fake(logits)


def _cross_entropy_context(ctx, inputs, output):
    logits, target, weight, *options, per_pixel, with_grad = inputs
    _, total, grad = output
    ctx.mark_non_differentiable(total, grad)
    ctx.per_pixel, ctx.options, ctx.dtype = per_pixel, options, logits.dtype
    if with_grad and not per_pixel:
        ctx.save_for_backward(grad)
    else:
        ctx.save_for_backward(logits, target, weight)


def _cross_entropy_backward(ctx, loss_grad, _total_grad, _grad_grad):
    if torch.is_grad_enabled():  # by create_graph=True; the second derivative would silently lack this loss's part
        raise RuntimeError("upsample_cross_entropy is differentiable once; for more take upsample_cross_entropy_reference")
    if len(ctx.saved_tensors) == 1:
        grad = ctx.saved_tensors[0] * loss_grad
    else:
        logits, target, weight = ctx.saved_tensors
        pixel_grad = loss_grad if ctx.per_pixel else loss_grad.expand(target.shape)
        grad = torch.ops.ops_ext.upsample_cross_entropy_backward(pixel_grad, logits, target, weight, *ctx.options)
    return grad.to(ctx.dtype), None, None, None, None, None, None, None


# ------------------------------------------------------------------------------------------------------------- deployment


def accelerate(
    model: nn.Module,
    *,
    device: torch.device | str | None = None,
    precision: torch.dtype | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Callable[[Tensor], Tensor]:
    """A copy of a trained network that goes from RGB images to label maps; the network itself is left as it is.

        segment = accelerate(load_weights("best_model.pth"))
        labels = segment(torch.from_numpy(numpy.array(image))[None])[0]

    On the CPU model.py's Fast-SCNN runs in kernels of its own, at any size without a compilation. Another network, or another
    device, runs in PyTorch in channels_last, with batch normalisation folded and the last step fused; on CUDA recorded as a graph
    for every size that comes twice, which must not depend on the pixels' values otherwise than through the kernels.

    Args:
        model: a network whose `model(x, upsample=False)` gives class scores at a lower resolution, to be upsampled as its
            attribute `align_corners` says, or else without.
        device: where to run; None leaves the model where it is.
        precision: float32, or bfloat16 or float16 for what is multiplied; None for the fastest that the device has and that
            loses next to nothing: bfloat16 where the CPU or the GPU multiplies it, else float16 on a GPU and float32 on a CPU.
        mean, std: of the training images per channel, in units of 1 (white).

    Returns:
        A function from (N, H, W, 3) uint8 RGB, on any device, to (N, H, W) uint8 labels on `device`. Its attribute
        `precision` names what it multiplies, fp32, bf16 or fp16; `stages_ms(images)` gives the times of its parts.

    Raises:
        ValueError: a precision that is none of these; from the function: what is no batch of images.
    """
    if precision not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"precision is {precision}, expected float32, bfloat16, float16 or None")
    device = torch.device(device) if device is not None else next(model.parameters()).device
    model = copy.deepcopy(model).eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    device = next(model.parameters()).device  # "cuda" alone would mean another one once the current device changes
    mean, std = ([float(value) for value in each] for each in (mean, std))
    fused = _fused(model, precision, mean, std) if device.type == "cpu" else None
    if precision is None:
        precision = fast_precision(device) if fused is None else torch.bfloat16 if fused.half else torch.float32
    run = fused or _in_pytorch(model, device, precision, mean, std)
    if device.type == "cuda":
        run = Recorded(run)

    @torch.inference_mode()
    def segment(images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3 or images.numel() == 0:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, expected uint8 (N, H, W, 3), not empty")
        return run(images.to(device))

    @torch.inference_mode()
    def stages_ms(images: Tensor, repeats: int = 20) -> dict[str, float]:
        """Median time of each part, in milliseconds."""
        images = images.to(device)
        if fused is not None:
            return fused.stages_ms(images, repeats)
        return {f"from {device.type} memory to {device.type} memory": median_ms(lambda: _finished(run(images)), repeats)}

    segment.stages_ms = stages_ms
    segment.precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(precision, "fp32")
    return segment


def _finished(result: Tensor) -> None:
    """Waits for the device."""
    if result.device.type != "cpu":
        torch.accelerator.synchronize(result.device)


def _in_pytorch(
    model: nn.Module, device: torch.device, precision: torch.dtype, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Tensor], Tensor]:
    """From uint8 images to label maps on `device`."""
    shift = torch.tensor(mean, device=device).view(3, 1, 1) * 255
    scale = 1 / (torch.tensor(std, device=device).view(3, 1, 1) * 255)
    casts = precision != torch.float32  # by autocast, unless the whole network can be of that type

    def scores(network: nn.Module, images: Tensor, dtype: torch.dtype, autocast: bool) -> Tensor:
        pixels = (images.permute(0, 3, 1, 2) - shift) * scale  # (N, 3, H, W), channels_last in memory
        with torch.autocast(device.type, precision, enabled=autocast):
            return network(pixels.to(dtype), upsample=False)  # (N, C, H/8, W/8)

    images = _sample_images().to(device)
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False  # it rounds more than folding does
    try:
        folded = copy.deepcopy(model)
        fold_batch_norm(folded)
        folded.to(precision)
        with torch.inference_mode():
            same = _agree(scores(folded, images, precision, False), scores(model, images, torch.float32, False), casts)
    except Exception:  # whatever a network raises that cannot be folded, is not of one type, or takes other sizes
        same = False
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    network, dtype, casts = (folded, precision, False) if same else (model, torch.float32, casts)
    align_corners = getattr(model, "align_corners", False)
    return lambda images: upsample_argmax(scores(network, images, dtype, casts), images.shape[1:3], align_corners)


def _sample_images() -> Tensor:
    return torch.arange(2 * 64 * 96 * 3).mul(7919).bitwise_and(255).byte().view(2, 64, 96, 3)


def _agree(scores: Tensor, expected: Tensor, half: bool) -> bool:
    """Whether a network is computed as it should be; rounding to `half` precision is forgiven."""
    if scores.shape != expected.shape:
        return False
    return bool((scores.float() - expected).norm() <= (0.05 if half else 1e-3) * expected.norm())


def fast_precision(device: torch.device) -> torch.dtype:
    """What a device multiplies fastest: bfloat16 where it does so natively, else float16 on a GPU, else float32."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return torch.bfloat16
            return torch.float16 if torch.cuda.get_device_capability() >= (7, 0) else torch.float32
    return torch.float32


@torch.inference_mode()
def _fused(
    model: nn.Module, precision: torch.dtype | None, mean: Sequence[float], std: Sequence[float]
) -> FusedFastSCNN | None:
    """The network in kernels of its own, if it is a Fast-SCNN of the shape that they compute, and they are there."""
    if precision == torch.float16 or not _compiled("cpu"):
        return None
    ops = torch.ops.ops_ext
    half = ops.has_fast_bfloat16() if precision is None else precision == torch.bfloat16
    if half and not ops.has_bfloat16():
        return None
    images = _sample_images()
    pixels = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    try:
        fused = FusedFastSCNN(model, mean, std, half)
        scores = fused.logits(images)
    except (AttributeError, RuntimeError):
        return None
    # Submodules of these names and sizes may still be put together otherwise: what counts is what comes out.
    expected = model(pixels.contiguous(memory_format=torch.channels_last), upsample=False)
    return fused if _agree(scores, expected, half) else None


# ----------------------------------------------------------------------------------------------------------------- checks


def _check_logits(logits: Tensor) -> None:
    if logits.ndim != 4 or logits.dtype not in LOGITS_DTYPES or logits.numel() == 0:
        expected = "float32, bfloat16, float16 or float64 (N, C, h, w), not empty"
        raise ValueError(f"logits are {logits.dtype} {tuple(logits.shape)}, expected {expected}")


def _check_labels(name: str, labels: Tensor) -> None:
    if labels.dtype not in (torch.uint8, torch.int64):
        raise ValueError(f"{name} is {labels.dtype}, expected uint8 or int64")


def _check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {other.device} like {other_name}")


def _check_range(name: str, labels: Tensor, num_classes: int, also: str = "") -> None:
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if outside.numel():
        raise RuntimeError(f"{name} holds {outside[0].item()}, expected labels from 0 to {num_classes - 1}{also}")
