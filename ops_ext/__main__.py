"""`python -m ops_ext`: compile the kernels now, and say what there is. Exit status 1 if the CPU's cannot be had."""

import sys
import time

import torch

from .compiler import cache_folder, load

failed = []
for device_type in ["cpu", "cuda"] if torch.version.cuda else ["cpu"]:
    start = time.perf_counter()
    try:
        load(device_type)
    except (OSError, RuntimeError) as error:
        failed.append(device_type)
        print(f"ops_ext: no {device_type} kernels, plain PyTorch instead: {error}")
    else:
        print(f"ops_ext: {device_type} kernels loaded from {cache_folder()} in {time.perf_counter() - start:.1f} s")
sys.exit("cpu" in failed)
