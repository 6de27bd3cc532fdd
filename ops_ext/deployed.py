"""What makes any network faster when it only predicts: folded batch normalisation, recorded CUDA graphs."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norm(model: nn.Module) -> None:
    """Replaces every convolution and the batch normalisation that stands next to it by one convolution, in place.

    Standing next to each other is not yet being called one after the other: whoever folds a network that they do not know
    compares its outputs.

    Args:
        model: a network in evaluation mode.
    """
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (name, conv), (bn_name, bn) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d) and bn.num_features == conv.out_channels:
                setattr(parent, name, fuse_conv_bn_eval(conv, bn))
                setattr(parent, bn_name, nn.Identity())


class Recorded:
    """A function of one tensor on a CUDA device, recorded as a CUDA graph for every shape that comes twice, then replayed.

    A network of small kernels spends more time launching than running them; a graph launches them all at once. The first call
    of a shape runs as it is, so that a folder of mixed sizes records nothing; the least recently used recording is dropped.
    Calls from several threads take turns; they are meant for one stream.

    Args:
        function: from a tensor to a tensor, always the same kernels for the same shape, no synchronisation.
        capacity: how many shapes are kept; each holds the function's memory for good.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], capacity: int = 8):
        self.function, self.capacity = function, capacity
        self.recordings: OrderedDict[tuple, tuple[torch.cuda.CUDAGraph, Tensor, Tensor] | None] = OrderedDict()
        self.lock = threading.Lock()

    def __call__(self, x: Tensor) -> Tensor:
        key = (*x.shape, x.dtype)
        with self.lock, torch.cuda.device(x.device):
            if key not in self.recordings:
                self.recordings[key] = None
                if len(self.recordings) > self.capacity:
                    self.recordings.popitem(last=False)
                return self.function(x)
            self.recordings.move_to_end(key)
            if self.recordings[key] is None:
                self.recordings[key] = self._record(x)
            graph, source, result = self.recordings[key]
            source.copy_(x)
            graph.replay()
            return result.clone()

    def _record(self, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        source, side = x.clone(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        try:
            with torch.cuda.stream(side):  # what is done once, such as cuDNN's choice of kernels, must not be recorded
                for _ in range(2):
                    self.function(source)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = self.function(source)
        finally:
            torch.backends.cudnn.benchmark = benchmark
        return graph, source, result
