"""Fast-SCNN on the CPU, block by block in the kernels of blocks.cpp."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .deployed import fold_batch_norm

MIN_SIZE = 32  # of an image's sides, in pixels
MULTIPLE = 32  # of which the kernels' channels are in bfloat16, and half of it in float32


class FusedFastSCNN:
    """From uint8 images to label maps, with a trained network's weights.

    Batch normalisation is folded into the convolution before it, the images' normalisation into the first one. Sums are
    float32; with `half` the 1x1 convolutions multiply bfloat16.

    Args:
        model: a network on the CPU, in evaluation mode, with the submodules of model.py's `FastSCNN`.
        mean, std: of the training images per channel, in units of 1 (white).
        half: take bfloat16 where the kernels can; needs a CPU with AVX512-BF16.

    Raises:
        AttributeError: the network has other submodules.
        RuntimeError: when it is called: channels that do not fit the kernels.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], half: bool):
        down, features = model.learning_to_downsample, model.global_feature_extractor
        fusion, classifier = model.feature_fusion, model.classifier
        blocks = [*features.bottleneck1, *features.bottleneck2, *features.bottleneck3]
        self.half = half
        self.align_corners = bool(getattr(model, "align_corners", False))
        self.padding = down.conv.conv.padding[0]
        separable = [each.depthwise for each in (down.dsconv1, down.dsconv2, classifier.dsconv1, classifier.dsconv2)]
        depthwise_relu = hasattr(separable[0], "relu")
        if any(hasattr(each, "relu") != depthwise_relu for each in separable):
            raise RuntimeError("the depthwise separable convolutions differ")
        self.multiple = MULTIPLE if half else MULTIPLE // 2
        weight, bias = _folded(down.conv)
        weight = weight / (torch.tensor(std) * 255).view(1, 3, 1, 1)
        first = (torch.tensor(mean) * 255, weight.permute(2, 3, 1, 0).reshape(27, -1).contiguous(), bias)
        separable = (*self._separable(down.dsconv1), *self._separable(down.dsconv2))
        self.stem = (*first, *separable, self.padding, depthwise_relu)
        self.detail_channels, self.score_channels = len(separable[-1]), len(self._padded(classifier.conv.bias))
        self.bottlenecks = [self._bottleneck(block) for block in blocks]
        # A dense 3x3 convolution after the pyramid (mmseg's) is one that PyTorch's library does well.
        dense = features.pyramid_pooling.project.conv.kernel_size != (1, 1)
        self.pyramid = None if dense else self._pyramid(features.pyramid_pooling)
        self.dense_pyramid = self._in_pytorch(features.pyramid_pooling) if dense else None
        self.classes = classifier.conv.out_channels
        # A dense 1x1 convolution of the context (segmentron's) commutes with resizing: it is done before, on a sixteenth of the
        # pixels, and in place of the depthwise kernel one that leaves everything as it is gives the ReLU.
        self.dense_context = None if fusion.depthwise.conv.groups > 1 else _folded(fusion.depthwise)
        self.head = (
            *(self._depthwise(fusion.depthwise) if self.dense_context is None else self._identity(fusion.depthwise)),
            *self._fusion(fusion),
            fusion.depthwise.conv.dilation[0],
            *self._separable(classifier.dsconv1),
            *self._separable(classifier.dsconv2),
            self._packed(classifier.conv.weight.flatten(1)),
            self._padded(classifier.conv.bias),
            depthwise_relu,
            self.align_corners,
        )
        self.kept: list[tuple[tuple[int, ...], list[Tensor]]] = []

    def logits(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, classes, ceil(H/8), ceil(W/8)) float32; without padding that is of H - 2 and W - 2."""
        maps = self._maps(*images.shape[:3])
        return self._run(images, maps).clone()

    def __call__(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, H, W) uint8 labels."""
        # The maps between the blocks are kept for the next image: fresh memory would cost more than the computation. They
        # belong to one call at a time; a second thread takes its own.
        shape = tuple(images.shape[:3])
        if min(shape[1:]) < MIN_SIZE:
            raise ValueError(f"images are {tuple(images.shape)}, expected at least {MIN_SIZE} pixels a side")
        try:
            kept_shape, maps = self.kept.pop()
        except IndexError:
            kept_shape, maps = None, []
        if kept_shape != shape:
            maps = self._maps(*shape)
        labels = torch.ops.ops_ext.upsample_argmax(self._run(images, maps), *shape[1:], self.align_corners)
        self.kept.append((shape, maps))
        return labels

    def stages_ms(self, images: Tensor, repeats: int) -> dict[str, float]:
        """Median time of each stage, in milliseconds."""
        maps = self._maps(*images.shape[:3])
        size = tuple(images.shape[1:3])
        self._run(images, maps)
        stages = {name: median_ms(stage, repeats) for name, stage in self._stages(images, maps).items()}
        tail = functools.partial(torch.ops.ops_ext.upsample_argmax, maps[-1][:, : self.classes], *size, self.align_corners)
        return {**stages, "labels": median_ms(tail, repeats)}

    def _run(self, images: Tensor, maps: list[Tensor]) -> Tensor:
        for stage in self._stages(images, maps).values():
            stage()
        return maps[-1][:, : self.classes]

    def _stages(self, images: Tensor, maps: list[Tensor]) -> dict[str, Callable[[], None]]:
        ops = torch.ops.ops_ext
        detail, *others, context, scores = maps

        def bottlenecks() -> None:
            for x, block, out in zip([detail, *others], self.bottlenecks, others):
                ops.bottleneck_block(x, *block, out)

        return {
            "learning to downsample": lambda: ops.stem_block(images, *self.stem, detail),
            "bottlenecks": bottlenecks,
            "pyramid pooling": lambda: self._pool(others[-1], context),
            "fusion and classifier": lambda: ops.head_block(detail, context, *self.head, scores),
        }

    def _pool(self, x: Tensor, context: Tensor) -> None:
        if self.dense_pyramid is None:
            torch.ops.ops_ext.pyramid_block(x, *self.pyramid, self.align_corners, context)
        else:
            context.copy_(self.dense_pyramid(x.bfloat16() if self.half else x))
        if self.dense_context is not None:
            context.copy_(F.conv2d(context, *self.dense_context))

    def _maps(self, n: int, height: int, width: int) -> list[Tensor]:
        """Memory for what the blocks give each other: detail, bottlenecks, context, scores."""

        def empty(channels: int, h: int, w: int) -> Tensor:
            return torch.empty((n, channels, h, w), memory_format=torch.channels_last)

        # As many pixels of the image as the first convolution has centres, halved three times and rounded up.
        h, w = ((size + 2 * self.padding - 3) // 8 + 1 for size in (height, width))
        detail, scores = empty(self.detail_channels, h, w), empty(self.score_channels, h, w)
        maps = [detail]
        for *_, bias, stride, _, _ in self.bottlenecks:
            h, w = (h - 1) // stride + 1, (w - 1) // stride + 1
            maps.append(empty(bias.shape[0], h, w))
        context = self.dense_pyramid.project.conv.out_channels if self.pyramid is None else self.pyramid[-1].shape[0]
        return [*maps, empty(context, h, w), scores]

    # Weights as the kernels take them, with channels of zeros up to a number that they divide.

    def _padded(self, values: Tensor) -> Tensor:
        return F.pad(values, (0, -values.shape[-1] % self.multiple))

    def _packed(self, weight: Tensor) -> Tensor:
        """(out, in) -> (in, out) float32, or (in / 2, out, 2) bfloat16."""
        weight = self._padded(self._padded(weight).t()).contiguous()
        if not self.half:
            return weight
        return weight.bfloat16().unflatten(0, (-1, 2)).transpose(1, 2).contiguous()

    def _pointwise(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        weight, bias = _folded(layer)
        return self._packed(weight.flatten(1)), self._padded(bias)

    def _depthwise(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        weight, bias = _folded(layer)
        return self._padded(weight.flatten(1).t()).contiguous(), self._padded(bias)  # (9, channels)

    def _identity(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """A depthwise kernel that changes nothing."""
        weight = torch.zeros(9, self._padded(layer.bn.bias).shape[0])
        weight[4] = 1
        return weight, torch.zeros(weight.shape[1])

    def _separable(self, block: nn.Module) -> tuple[Tensor, ...]:
        return (*self._depthwise(block.depthwise), *self._pointwise(block.pointwise))

    def _bottleneck(self, block: nn.Module) -> tuple:
        layers = (*self._pointwise(block.expand), *self._depthwise(block.depthwise), *self._pointwise(block.project))
        return (*layers, block.depthwise.conv.stride[0], block.residual, isinstance(block.expand.relu, nn.ReLU6))

    def _pyramid(self, pooling: nn.Module) -> tuple[Tensor, ...]:
        reduce = [_folded(layer) for layer in pooling.reduce]
        weight, bias = _folded(pooling.project)
        own, levels = weight.flatten(1).split([weight.shape[1] // 2] * 2, 1)  # of the input, of its averages
        narrow = torch.cat([each.flatten(1).t() for each, _ in reduce]).contiguous()
        return (narrow, torch.cat([each for _, each in reduce]), levels.t().contiguous(), self._packed(own), bias)

    def _in_pytorch(self, module: nn.Module) -> nn.Module:
        module = copy.deepcopy(module).eval()
        fold_batch_norm(module)
        return module.to(torch.bfloat16 if self.half else torch.float32, memory_format=torch.channels_last)

    def _fusion(self, fusion: nn.Module) -> tuple[Tensor, Tensor]:
        """The convolutions of the context and of the detail as one, of both side by side."""
        (context, context_bias), (detail, detail_bias) = self._pointwise(fusion.context), self._pointwise(fusion.detail)
        return torch.cat([context, detail]), context_bias + detail_bias


def _folded(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution and the batch normalisation after it."""
    conv, bn = layer.conv, layer.bn
    statistics = (bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
    return weight.detach(), bias.detach()


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call, in milliseconds."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])
