"""Fast-SCNN on the CPU, block by block in the kernels of blocks.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

MULTIPLE = 16  # of which the kernels' channels are


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
        weight, bias = _folded(down.conv)
        weight = weight / (torch.tensor(std) * 255).view(1, 3, 1, 1)
        self.first = (torch.tensor(mean) * 255, weight.permute(2, 3, 1, 0).reshape(27, -1).contiguous(), bias)
        self.stem = (*_depthwise(down.dsconv1.depthwise), *self._pointwise(down.dsconv1.pointwise))
        self.detail = self._separable(down.dsconv2)
        self.bottlenecks = [self._bottleneck(block) for block in blocks]
        self.pyramid = self._pyramid(features.pyramid_pooling)
        self.fusion = (*_depthwise(fusion.depthwise), *self._pointwise(fusion.context), *self._pointwise(fusion.detail))
        self.dilation = fusion.depthwise.conv.dilation[0]
        self.classifier = [self._separable(classifier.dsconv1), self._separable(classifier.dsconv2)]
        self.classes = classifier.conv.out_channels
        padding = -self.classes % MULTIPLE
        weight, bias = classifier.conv.weight.flatten(1), classifier.conv.bias
        self.scores = (self._packed(F.pad(weight, (0, 0, 0, padding))), F.pad(bias, (0, padding)), False)
        self.kept: list[tuple[tuple[int, ...], list[Tensor]]] = []

    def logits(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, classes, ceil(H/8), ceil(W/8)) float32."""
        maps = self._maps(*images.shape[:3])
        return self._run(images, maps).clone()

    def __call__(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, H, W) uint8 labels."""
        # The maps between the blocks are kept for the next image: fresh memory would cost more than the computation. They
        # belong to one call at a time; a second thread takes its own.
        shape = tuple(images.shape[:3])
        try:
            kept_shape, maps = self.kept.pop()
        except IndexError:
            kept_shape, maps = None, []
        if kept_shape != shape:
            maps = self._maps(*shape)
        labels = torch.ops.ops_ext.upsample_argmax(self._run(images, maps), shape[1], shape[2], False)
        self.kept.append((shape, maps))
        return labels

    def _run(self, images: Tensor, maps: list[Tensor]) -> Tensor:
        ops, free = torch.ops.ops_ext, iter(maps)

        def through(op, x: Tensor, arguments: tuple) -> Tensor:
            out = next(free)
            op(x, *arguments, out)
            return out

        x = through(ops.stem_block, images, (*self.first, *self.stem))
        x = detail = through(ops.separable_block, x, self.detail)
        for block in self.bottlenecks:
            x = through(ops.separable_block, x, block)
        x = through(ops.pyramid_block, x, self.pyramid)
        x = through(ops.fusion_block, detail, (x, *self.fusion, self.dilation))
        for block in self.classifier:
            x = through(ops.separable_block, x, block)
        return through(ops.pointwise_block, x, self.scores)[:, : self.classes]

    def _maps(self, n: int, height: int, width: int) -> list[Tensor]:
        """Memory for the results of all blocks, in their order."""

        def after(x: Tensor | None, stride: int, channels: int, h: int = 0, w: int = 0) -> Tensor:
            h, w = (h, w) if x is None else x.shape[2:]
            size = (n, channels, (h - 1) // stride + 1, (w - 1) // stride + 1)
            return torch.empty(size, memory_format=torch.channels_last)

        maps = [after(None, 4, self.stem[3].shape[0], height, width)]
        for *_, project_bias, stride, _, _, _ in (self.detail, *self.bottlenecks):
            maps.append(after(maps[-1], stride, project_bias.shape[0]))
        maps.append(after(maps[-1], 1, self.pyramid[-1].shape[0]))
        maps.append(after(maps[1], 1, self.fusion[3].shape[0]))
        for *_, project_bias, _, _, _, _ in self.classifier:
            maps.append(after(maps[-1], 1, project_bias.shape[0]))
        return [*maps, after(maps[-1], 1, self.scores[1].shape[0])]

    # Weights as the kernels take them.

    def _packed(self, weight: Tensor) -> Tensor:
        """(out, in) -> (in, out) float32, or (in / 2, out, 2) bfloat16."""
        weight = weight.t().contiguous()
        if not self.half:
            return weight
        return weight.bfloat16().unflatten(0, (-1, 2)).transpose(1, 2).contiguous()

    def _pointwise(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        weight, bias = _folded(layer)
        return self._packed(weight.flatten(1)), bias

    def _separable(self, block: nn.Module) -> tuple:
        stride = block.depthwise.conv.stride[0]
        return (None, None, *_depthwise(block.depthwise), *self._pointwise(block.pointwise), stride, False, True, False)

    def _bottleneck(self, block: nn.Module) -> tuple:
        layers = (*self._pointwise(block.expand), *_depthwise(block.depthwise), *self._pointwise(block.project))
        return (*layers, block.depthwise.conv.stride[0], True, False, block.residual)

    def _pyramid(self, pooling: nn.Module) -> tuple[Tensor, ...]:
        reduce = [_folded(layer) for layer in pooling.reduce]
        weight, bias = _folded(pooling.project)
        own, levels = weight.flatten(1).split([weight.shape[1] // 2] * 2, 1)  # of the input, of its averages
        narrow = torch.cat([each.flatten(1).t() for each, _ in reduce]).contiguous()
        return (narrow, torch.cat([each for _, each in reduce]), levels.t().contiguous(), self._packed(own), bias)


def _folded(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution and the batch normalisation after it."""
    conv, bn = layer.conv, layer.bn
    statistics = (bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
    return weight.detach(), bias.detach()


def _depthwise(layer: nn.Module) -> tuple[Tensor, Tensor]:
    weight, bias = _folded(layer)
    return weight.flatten(1).t().contiguous(), bias  # (9, channels)
