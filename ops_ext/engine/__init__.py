"""Fast-SCNN on the CPU, block by block in the kernels of blocks.cpp."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_SIZE = 32  # of an image's sides, in pixels
DEPTH = 32  # of which the kernels' channels are a multiple in bfloat16, and of half of it in float32
BINS = (1, 2, 3, 6)  # a side, of pyramid pooling

# Each writes its last argument, (N, C, h, w) float32 in channels_last as all maps are. `weights` holds the kernel and
# the bias of one layer after the other.
for _name, _arguments in {
    "stem_block": "Tensor images, float[] outside, Tensor[] weights, int padding, bool depthwise_relu",
    "bottleneck_block": "Tensor x, Tensor[] weights, int stride, bool residual, bool relu6",
    "pointwise_block": "Tensor x, Tensor[] weights, Tensor added",
    "head_block": "Tensor detail, Tensor context, Tensor[] weights, int dilation, bool depthwise_relu, bool corners",
}.items():
    torch.library.define(f"ops_ext::{_name}", f"({_arguments}, Tensor(a!) out) -> ()")
torch.library.define("ops_ext::has_fast_bfloat16", "() -> bool")


@dataclass
class Buffers:
    """What belongs to one size of images: the maps between the blocks, and the matrices of pyramid pooling."""

    images: tuple[int, ...]  # N, H, W
    detail: Tensor
    bottlenecks: list[Tensor]
    context: Tensor
    scores: Tensor
    pooling: Tensor  # (50, h w): from pixels to the averages of all bins
    spreading: Tensor  # (h w, 50): back, bilinear, summed over the levels of the pyramid


class FusedFastSCNN:
    """From (N, H, W, 3) uint8 images to (N, H, W) uint8 label maps, with a trained network's weights.

    The images' normalisation is folded into the first convolution. Sums are float32; with `dtype` bfloat16 the products
    of matrices are of that.

    Args:
        model: a network on the CPU, in evaluation mode, with the submodules of model.py's `FastSCNN`, whose batch
            normalisation is folded into its convolutions.
        mean, std: (3,), of the training images per channel, in units of 1 (white).
        dtype: float32, or bfloat16 on a CPU with AVX512-BF16.

    Raises:
        AttributeError: the network has other submodules.
        RuntimeError: another dtype; when it is called: channels that do not fit the kernels, a CPU without that dtype.
    """

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor, dtype: torch.dtype):
        if dtype not in (torch.float32, torch.bfloat16):
            raise RuntimeError(f"it computes in float32 and bfloat16, not in {dtype}")
        down, features = model.learning_to_downsample, model.global_feature_extractor
        fusion, classifier = model.feature_fusion, model.classifier
        self.dtype, self.align_corners = dtype, getattr(model, "align_corners", False)
        self.padding, self.dilation = down.conv.conv.padding[0], fusion.depthwise.conv.dilation[0]
        self.depthwise_relu = hasattr(down.dsconv1.depthwise, "relu")
        self.outside = (mean * 255).to(dtype).tolist()
        self.stem = [*self._first(down.conv, mean, std), *self._separable(down.dsconv1), *self._separable(down.dsconv2)]
        blocks = [*features.bottleneck1, *features.bottleneck2, *features.bottleneck3]
        self.bottlenecks = [self._bottleneck(block) for block in blocks]
        # A dense 3x3 convolution after the pyramid (mmseg's) is one that PyTorch's library does well.
        pooling = features.pyramid_pooling
        dense = pooling.project.conv.kernel_size != (1, 1)
        self.dense_pyramid = copy.deepcopy(pooling).to(dtype, memory_format=torch.channels_last) if dense else None
        if not dense:
            self._set_pyramid(pooling)
        # A dense 1x1 convolution of the context (segmentron's) commutes with resizing: it is done before, on a
        # sixteenth of the pixels, and in place of the depthwise kernel one that leaves everything as it is gives the
        # ReLU.
        self.dense_context = _layer(fusion.depthwise) if fusion.depthwise.conv.groups == 1 else None
        self.classes = classifier.conv.out_channels
        self.head = [
            *(
                self._depthwise(*_layer(fusion.depthwise))
                if self.dense_context is None
                else self._identity(fusion.depthwise)
            ),
            *self._fusion(fusion),
            *self._separable(classifier.dsconv1),
            *self._separable(classifier.dsconv2),
            *self._pointwise(*_layer(classifier)),
        ]
        self.kept: list[Buffers] = []

    def __call__(self, images: Tensor, size: Sequence[int]) -> Tensor:
        if min(images.shape[1:3]) < MIN_SIZE:
            raise ValueError(f"images are {tuple(images.shape)}, expected at least {MIN_SIZE} pixels a side")
        # Buffers are kept for the next image: fresh memory would cost more than the computation. They belong to one
        # call at a time; a second thread takes its own.
        try:
            buffers = self.kept.pop()
        except IndexError:
            buffers = None
        if buffers is None or buffers.images != images.shape[:3]:
            buffers = self.buffers(images)
        self.run(images, buffers)
        labels = self._labels(buffers, size)
        self.kept.append(buffers)
        return labels

    def logits(self, images: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 -> (N, classes, ceil(H/8), ceil(W/8)); without padding that is of H - 2 and W - 2."""
        buffers = self.buffers(images)
        self.run(images, buffers)
        return buffers.scores[:, : self.classes].clone()

    def run(self, images: Tensor, buffers: Buffers) -> None:
        """Fills the buffers, from detail to scores."""
        self._downsample(images, buffers)
        self._bottlenecks(buffers)
        self._pool(buffers)
        self._classify(buffers)

    def buffers(self, images: Tensor) -> Buffers:
        n, height, width = images.shape[:3]

        def empty(channels: int, h: int, w: int) -> Tensor:
            return torch.empty((n, channels, h, w), memory_format=torch.channels_last)

        # As many pixels of the image as the first convolution has centres, halved three times and rounded up.
        h, w = ((size + 2 * self.padding - 3) // 8 + 1 for size in (height, width))
        detail, scores = empty(len(self.stem[-1]), h, w), empty(len(self.head[-1]), h, w)
        maps = []
        for weights, stride, *_ in self.bottlenecks:
            h, w = (h - 1) // stride + 1, (w - 1) // stride + 1
            maps.append(empty(len(weights[-1]), h, w))
        pooling = torch.cat([_kron(self._averaging(h, bins), self._averaging(w, bins)) for bins in BINS])
        spreading = (
            torch.cat([_kron(self._resizing(bins, h), self._resizing(bins, w)) for bins in BINS]).t().contiguous()
        )
        context = empty(len(self.head[1]), h, w)
        return Buffers((n, height, width), detail, maps, context, scores, pooling, spreading)

    def _averaging(self, size: int, bins: int) -> Tensor:
        """(bins, size): what each bin takes of a row of pixels."""
        return F.adaptive_avg_pool1d(torch.eye(size), bins).t()

    def _resizing(self, bins: int, size: int) -> Tensor:
        """(bins, size): what each bin gives to a row of pixels."""
        return F.interpolate(torch.eye(bins)[None], size, mode="linear", align_corners=self.align_corners)[0]

    # The stages.

    def _downsample(self, images: Tensor, buffers: Buffers) -> None:
        options = (self.padding, self.depthwise_relu)
        torch.ops.ops_ext.stem_block(images.contiguous(), self.outside, self.stem, *options, buffers.detail)

    def _bottlenecks(self, buffers: Buffers) -> None:
        x = buffers.detail
        for block, out in zip(self.bottlenecks, buffers.bottlenecks):
            torch.ops.ops_ext.bottleneck_block(x, *block, out)
            x = out

    def _pool(self, buffers: Buffers) -> None:
        x, context = buffers.bottlenecks[-1], buffers.context
        if self.dense_pyramid is not None:
            context.copy_(self.dense_pyramid(x.to(self.dtype)))
        else:
            pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # (N, h w, C)
            averages = buffers.pooling @ pixels  # (N, 50, C)
            levels = (averages @ self.reduce + self.reduce_bias).relu_() * self.own_level  # (N, 50, C)
            torch.ops.ops_ext.pointwise_block(
                x, self.project, buffers.spreading @ (levels @ self.project_levels), context
            )
        if self.dense_context is not None:
            context.copy_(F.conv2d(context, *self.dense_context))

    def _classify(self, buffers: Buffers) -> None:
        options = (self.dilation, self.depthwise_relu, self.align_corners)
        torch.ops.ops_ext.head_block(buffers.detail, buffers.context, self.head, *options, buffers.scores)

    def _labels(self, buffers: Buffers, size: Sequence[int]) -> Tensor:
        scores = buffers.scores[:, : self.classes]
        return torch.ops.ops_ext.upsample_argmax(scores, *size, self.align_corners)

    # Weights as the kernels take them, with channels of zeros up to a number that they divide.

    def _padded(self, values: Tensor) -> Tensor:
        return F.pad(values, (0, -values.shape[-1] % (DEPTH if self.dtype == torch.bfloat16 else DEPTH // 2)))

    def _packed(self, weight: Tensor) -> Tensor:
        """(..., in, out) -> the same in float32, or (..., in / 2, out, 2) in bfloat16."""
        if self.dtype == torch.float32:
            return weight.contiguous()
        return weight.bfloat16().unflatten(-2, (-1, 2)).transpose(-1, -2).contiguous()

    def _first(self, layer: nn.Module, mean: Tensor, std: Tensor) -> list[Tensor]:
        """Each row of the kernel as a matrix of DEPTH inputs, of which 9 count, and the bias less the mean."""
        weight, bias = _layer(layer)
        weight = (weight / (std * 255).view(1, 3, 1, 1)).to(self.dtype).float()
        bias = bias - (weight.sum((2, 3), dtype=torch.float64) @ (mean * 255).double()).float()
        rows = weight.permute(2, 3, 1, 0).flatten(1, 2)  # (3, 9, out)
        return [self._packed(self._padded(F.pad(rows, (0, 0, 0, DEPTH - 9)))), self._padded(bias)]

    def _pointwise(self, weight: Tensor, bias: Tensor) -> list[Tensor]:
        weight = self._padded(self._padded(weight.flatten(1)).t())  # (in, out)
        return [self._packed(weight), self._padded(bias)]

    def _depthwise(self, weight: Tensor, bias: Tensor) -> list[Tensor]:
        weight, bias = self._padded(weight.flatten(1).t()), self._padded(bias)  # (9, channels), (channels)
        if self.dtype == torch.bfloat16:  # of 32 channels those in even places come first
            weight, bias = (each.unflatten(-1, (-1, 16, 2)).transpose(-1, -2).flatten(-3) for each in (weight, bias))
        return [weight.contiguous(), bias.contiguous()]

    def _identity(self, layer: nn.Module) -> list[Tensor]:
        """A depthwise kernel that changes nothing."""
        weight = torch.zeros(layer.conv.out_channels, 1, 3, 3)
        weight[:, :, 1, 1] = 1
        return self._depthwise(weight, torch.zeros(layer.conv.out_channels))

    def _separable(self, block: nn.Module) -> list[Tensor]:
        return [*self._depthwise(*_layer(block.depthwise)), *self._pointwise(*_layer(block.pointwise))]

    def _bottleneck(self, block: nn.Module) -> tuple:
        expand, depthwise, project = (_layer(layer) for layer in (block.expand, block.depthwise, block.project))
        weights = [*self._pointwise(*expand), *self._depthwise(*depthwise), *self._pointwise(*project)]
        return weights, block.depthwise.conv.stride[0], block.residual, isinstance(block.expand.relu, nn.ReLU6)

    def _set_pyramid(self, pooling: nn.Module) -> None:
        """The levels' convolutions side by side as one, and the last one's parts, of the input and of the levels.

        What comes from a level is convolved before it is resized, where it is a few pixels; the two commute.
        """
        levels = [_layer(layer) for layer in pooling.reduce]
        self.reduce = torch.cat([weight.flatten(1).t() for weight, _ in levels], 1)  # (C, C)
        self.reduce_bias = torch.cat([bias for _, bias in levels])
        self.own_level = torch.block_diag(*(torch.ones(bins**2, len(bias)) for bins, (_, bias) in zip(BINS, levels)))
        weight, bias = _layer(pooling.project)
        own, of_levels = weight.flatten(1).chunk(2, 1)
        self.project = self._pointwise(own, bias)
        self.project_levels = self._padded(of_levels.t())  # (C, out)

    def _fusion(self, fusion: nn.Module) -> list[Tensor]:
        """The convolutions of the context and of the detail as one, of both side by side."""
        (context, context_bias), (detail, detail_bias) = (
            self._pointwise(*_layer(layer)) for layer in (fusion.context, fusion.detail)
        )
        return [torch.cat([context, detail]), context_bias + detail_bias]


def _kron(rows: Tensor, columns: Tensor) -> Tensor:
    """(a, h) and (b, w) -> (a b, h w): of both axes of a map at once."""
    return torch.einsum("ah,bw->abhw", rows, columns).flatten(2).flatten(0, 1)


def _layer(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution."""
    if layer.conv.bias is None:
        raise RuntimeError("a convolution has no bias, so that its batch normalisation is not folded")
    return layer.conv.weight, layer.conv.bias
