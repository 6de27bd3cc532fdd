"""`python -m ops_ext`: compile the kernels now, and say what there is. Exit status 1 if the CPU kernels cannot be had."""

import sys
import time

import torch

from .compiler import BuildError, build, cache_folder

failed = []
for backend in ["cpu", "cuda"] if torch.version.cuda else ["cpu"]:
    start = time.perf_counter()
    try:
        library = build(backend)
    except BuildError as error:
        failed.append(backend)
        print(f"ops_ext: no compiled {backend} kernels, plain PyTorch instead: {error}")
    else:
        print(f"ops_ext: {backend} kernels in {cache_folder()}/{library.name} ({time.perf_counter() - start:.1f} s)")
sys.exit("cpu" in failed)
