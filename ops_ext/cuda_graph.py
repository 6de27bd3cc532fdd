"""A network of small kernels on CUDA takes longer to launch than to run; a recorded graph launches them all at once."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Recorded:
    """A function of a tensor and a size, recorded as a CUDA graph for inputs whose shapes come twice, then replayed.

    The first call of a shape runs as it is, so a folder of mixed sizes records nothing. The least recently used
    recording is dropped. A shape that cannot be recorded runs as it is, and a warning says why.

    Args:
        function: always the same kernels for the same shapes.
        capacity: number of shapes; each keeps the function's memory.
    """

    def __init__(self, function: Callable[[Tensor, Sequence[int]], Tensor], capacity: int = 8):
        self.function, self.capacity, self.lock = function, capacity, threading.Lock()
        self.recordings: OrderedDict[tuple, tuple[torch.cuda.CUDAGraph, Tensor, Tensor] | str] = OrderedDict()

    def __call__(self, x: Tensor, size: Sequence[int]) -> Tensor:
        key = (*x.shape, *size)
        with self.lock, torch.cuda.device(x.device):
            if key not in self.recordings:
                self.recordings[key] = "seen once"
                if len(self.recordings) > self.capacity:
                    self.recordings.popitem(last=False)
                return self.function(x, size)
            self.recordings.move_to_end(key)
            if self.recordings[key] == "seen once":
                try:
                    self.recordings[key] = self._record(x, size)
                except RuntimeError as error:  # it waits for the device, or there is too little memory
                    self.recordings[key] = "failed"
                    reason = f"no CUDA graph for {tuple(x.shape)}, which runs slower. Cause: {error}"
                    warnings.warn(f"ops_ext: {reason}", RuntimeWarning, stacklevel=3)
            if self.recordings[key] == "failed":
                return self.function(x, size)
            graph, source, result = self.recordings[key]
            source.copy_(x)
            graph.replay()
            return result.clone()

    def _record(self, x: Tensor, size: Sequence[int]) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        source, stream, graph = x.clone(), torch.cuda.Stream(x.device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is done once, such as cuDNN's choice of kernels, must not be recorded
            for _ in range(2):
                self.function(source, size)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = self.function(source, size)
        torch.cuda.current_stream().wait_stream(stream)
        return graph, source, result
