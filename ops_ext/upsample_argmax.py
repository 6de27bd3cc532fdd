"""Class scores to a label map: reference, public function, schema and fake of one operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiler import has_kernels

MAX_CLASSES = 256  # label maps are uint8
SCHEMA = "(Tensor logits, SymInt height, SymInt width, bool align_corners) -> Tensor"


def upsample_argmax_reference(logits: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """`upsample_argmax` in plain PyTorch."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()  # in half precision many scores would round to a tie
    if logits.device.type == "cpu":  # argmax is several times faster where a pixel's scores lie side by side
        logits = logits.contiguous(memory_format=torch.channels_last)
    scores = F.interpolate(logits, tuple(size), mode="bilinear", align_corners=align_corners)
    return scores.argmax(1).to(torch.uint8)


def upsample_argmax(logits: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Label map of bilinearly resized class scores.

    `F.interpolate(logits, size, mode="bilinear", align_corners=align_corners).argmax(1)`, computed in float32 where the
    logits are float16 or bfloat16, and by the reference where they are float64.

    Args:
        logits: (N, C, h, w) floating point of any strides, C <= 256.
        size: (H, W) of the result in pixels.
        align_corners: as in `F.interpolate`.

    Returns:
        (N, H, W) uint8. Of equal scores the first class wins; NaN wins over numbers, as in `torch.argmax`. Where the
        two best scores differ by less than rounding, either may be named.

    Raises:
        ValueError: wrong rank, dtype, class count or size.
    """
    if logits.ndim != 4 or not logits.is_floating_point() or logits.numel() == 0:
        raise ValueError(
            f"logits are {logits.dtype} {tuple(logits.shape)}, expected floating point (N, C, h, w), not empty"
        )
    if logits.shape[1] > MAX_CLASSES:
        raise ValueError(f"logits have {logits.shape[1]} classes, expected at most {MAX_CLASSES}: labels are uint8")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size is {size}, expected (height, width) of at least 1 pixel each")
    if logits.dtype == torch.float64 or not has_kernels(logits.device.type):
        return upsample_argmax_reference(logits, size, align_corners)
    return torch.ops.ops_ext.upsample_argmax(logits.float(), size[0], size[1], align_corners)


torch.library.define("ops_ext::upsample_argmax", SCHEMA)


@torch.library.register_fake("ops_ext::upsample_argmax")
def _fake(logits, height, width, align_corners):
    return logits.new_empty((logits.shape[0], height, width), dtype=torch.uint8)
