"""Random cases for the operators of ops_ext, and the checks against plain PyTorch in float64.

Shapes, strides and options are all drawn from the seed. Imported by tests/test_kernels.py, also under sanitizers.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F


def _restrided(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """The same values in other strides: channels_last, every second element, a permuted or an expanded buffer."""
    kind = rng.choice(["contiguous", "channels_last", "sliced", "permuted", "offset"])
    if kind == "channels_last" and tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if kind == "sliced":
        buffer = tensor.new_zeros([2 * extent for extent in tensor.shape])
        view = buffer[tuple(slice(1, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor)
    if kind == "permuted":
        order = rng.sample(range(tensor.ndim), tensor.ndim)
        return tensor.permute(order).contiguous().permute([order.index(d) for d in range(tensor.ndim)])
    if kind == "offset":  # as a part of a larger buffer whose start is aligned
        buffer = tensor.new_zeros(tensor.numel() + 1)
        return buffer[1:].view(tensor.shape).copy_(tensor)
    return tensor


def _logits(rng: random.Random, most_classes: int) -> tuple[torch.Tensor, tuple[int, int]]:
    n, classes = rng.randint(1, 3), rng.choice([1, 2, 3, 11, 19, rng.randint(1, most_classes)])
    h, w = rng.randint(1, 9), rng.choice([rng.randint(1, 9), rng.randint(1, 40)])
    scale = rng.choice([0.1, 0.5, 1, 2, 4, 8, 8, 8.3, 16])
    size = (max(1, round(h * scale) + rng.randint(-1, 1)), max(1, round(w * scale) + rng.randint(-1, 1)))
    logits = torch.randn(n, classes, h, w) * rng.choice([0.1, 1, 10])
    if rng.random() < 0.3:  # large areas of one class, as in a street
        logits = F.avg_pool2d(logits, 5, 1, 2) * 5
    return _restrided(logits, rng), size


def _seeded(seed: int) -> random.Random:
    torch.manual_seed(seed)
    return random.Random(seed)


def argmax_case(seed: int) -> tuple:
    rng = _seeded(seed)
    return (*_logits(rng, 256), rng.random() < 0.5)


def check_argmax(ops, device: torch.device, case: tuple) -> None:
    logits, size, align_corners = case
    labels = ops.upsample_argmax(logits.to(device), *size, align_corners).cpu().long()
    scores = F.interpolate(logits.double(), size, mode="bilinear", align_corners=align_corners)
    assert labels.shape == scores[:, 0].shape
    chosen = scores.gather(1, labels[:, None])[:, 0]
    # Sizes and weights in float32 round as well: a step of 1e-6 of the image times the steepest slope.
    tolerance = 1e-5 * (1 + scores.abs().max())
    assert (scores.amax(1) - chosen <= tolerance).all()


def cross_entropy_case(seed: int) -> tuple:
    rng = _seeded(seed)
    logits, size = _logits(rng, 300)
    classes = logits.shape[1]
    ignore_index = rng.choice([255, 255, -100, 0])
    target = torch.randint(0, min(classes, 255), (logits.shape[0], *size))
    target[torch.rand(target.shape) < rng.choice([0, 0.1, 0.9, 1])] = ignore_index
    if ignore_index >= 0 and rng.random() < 0.5:
        target = target.byte()
    weight = _restrided(torch.rand(classes) + 0.1, rng) if rng.random() < 0.5 else None
    return logits, _restrided(target, rng), weight, ignore_index, rng.random() < 0.5


def check_cross_entropy(ops, device: torch.device, case: tuple) -> None:
    logits, target, weight, ignore_index, align_corners = case
    exact = logits.detach().double().requires_grad_()
    scores = F.interpolate(exact, target.shape[1:], mode="bilinear", align_corners=align_corners)
    options = {"weight": None if weight is None else weight.double(), "ignore_index": ignore_index}
    expected = F.cross_entropy(scores, target.long(), **options, reduction="none")
    valid = target != ignore_index
    weights = torch.ones(logits.shape[1]) if weight is None else weight
    total = weights.double()[target.long().where(valid, 0)][valid].sum()
    pixel_grad = torch.rand(target.shape)
    (grad_of_sum,) = torch.autograd.grad(expected.sum(), exact, retain_graph=True)
    (grad_of_pixels,) = torch.autograd.grad((expected * pixel_grad).sum(), exact)

    arguments = (logits.to(device), target.to(device), None if weight is None else weight.to(device))
    summed, counted, grad = ops.upsample_cross_entropy(*arguments, None, ignore_index, align_corners, False, True)
    each, counted_again, _ = ops.upsample_cross_entropy(*arguments, None, ignore_index, align_corners, True, False)
    *_, back = ops.upsample_cross_entropy(*arguments, pixel_grad.to(device), ignore_index, align_corners, False, True)

    # Scores of +-30 are off by some 1e-5 in float32, and gradients are differences: of a single class, 0 as 1 - 1.
    for name, value, wanted in (
        ("sum", summed, expected.sum()),
        ("weights", counted, total),
        ("weights", counted_again, total),
        ("losses", each, expected),
        ("gradient", grad, grad_of_sum),
        ("gradient of pixels", back, grad_of_pixels),
    ):
        assert value.dtype == torch.float32 and value.shape == wanted.shape, name
        scale = wanted.abs().max().item() + 0.05 * valid.any().item()
        assert ((value.cpu().double() - wanted).abs() <= 2e-4 * scale).all(), name
    assert (each.cpu()[~valid] == 0).all()
