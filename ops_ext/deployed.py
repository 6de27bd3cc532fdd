"""What makes any network faster when it only predicts: folded batch normalisation, recorded CUDA graphs."""

from __future__ import annotations

import itertools
import threading
import warnings
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
        model: a network in evaluation mode. Normalisations without running statistics and parametrised convolutions stay.
    """
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (name, conv), (bn_name, bn) in itertools.pairwise(children):
            plain = type(conv) is nn.Conv2d and isinstance(bn, nn.BatchNorm2d | nn.SyncBatchNorm)
            if plain and bn.num_features == conv.out_channels and bn.running_mean is not None:
                setattr(parent, name, fuse_conv_bn_eval(conv, bn))
                setattr(parent, bn_name, nn.Identity())


_recording = threading.Lock()  # of one graph at a time in this process


class Recorded:
    """A function of one tensor on a CUDA device, recorded as a CUDA graph for every shape that comes twice, then replayed.

    A network of small kernels spends more time launching than running them; a graph launches them all at once. The first call
    of a shape runs as it is, so that a folder of mixed sizes records nothing; the least recently used recording is dropped. What
    cannot be recorded runs as it is, and one warning says so. Calls from several threads take turns; they are meant for one stream.

    Args:
        function: from a tensor to a tensor, always the same kernels for the same shape.
        capacity: how many shapes are kept; each holds the function's memory for good.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], capacity: int = 8):
        self.function, self.capacity, self.records = function, capacity, True
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
            if self.recordings[key] is None and self.records:
                try:
                    self.recordings[key] = self._record(x)
                except RuntimeError as error:  # it waits for the device somewhere, or the graph's memory is not there
                    self.records = False
                    reason = " ".join(str(error).split())[:200]
                    warnings.warn(
                        f"ops_ext: no CUDA graph, the network runs as it is. Cause: {reason}", RuntimeWarning, stacklevel=3
                    )
            if self.recordings[key] is None:
                return self.function(x)
            graph, source, result = self.recordings[key]
            source.copy_(x)
            graph.replay()
            return result.clone()

    def _record(self, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        source, side, graph = x.clone(), torch.cuda.Stream(x.device), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with _recording:
            benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
            try:
                with torch.cuda.stream(side):  # what is done once, such as cuDNN's choice of kernels, must not be recorded
                    for _ in range(2):
                        self.function(source)
                # On this device's own stream, and without regard to what other threads do meanwhile.
                with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                    result = self.function(source)
            finally:
                torch.backends.cudnn.benchmark = benchmark
                torch.cuda.current_stream().wait_stream(side)
        return graph, source, result
