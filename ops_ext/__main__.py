"""`python -m ops_ext`: compile the kernels now, and say what there is. Exit status 1 if the CPU's cannot be had."""

import sys
import time

import torch

from .compiler import BuildError, cache_folder, load

failed = []
for backend in ["cpu", "cuda"] if torch.version.cuda else ["cpu"]:
    start = time.perf_counter()
    try:
        load(backend)
    except BuildError as error:
        failed.append(backend)
        print(f"ops_ext: no {backend} kernels, plain PyTorch instead: {error}")
    else:
        print(f"ops_ext: {backend} kernels loaded from {cache_folder()} in {time.perf_counter() - start:.1f} s")
sys.exit("cpu" in failed)
