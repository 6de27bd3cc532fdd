"""The two ends of a segmentation network as fused operators, and the whole of Fast-SCNN on the CPU.

    upsample_argmax(logits, size)            class scores to a label map
    upsample_cross_entropy(logits, target)   class scores to a loss
    accelerate(model)                        a trained network from RGB images to label maps

Each operator is stated as its plain PyTorch one-liner, and `x_reference` is that one-liner. On the CPU and on NVIDIA
GPUs kernels run that never write class scores at full resolution; they are compiled on first use, or by
`python -m ops_ext`, which needs a C++ compiler (g++ or clang++), for GPUs also nvcc. Where that fails, and on other
devices, the reference runs, with the same results, and one warning names the cause. `implementations()` says what runs
on this machine.

The kernels compute in float32 and trace under `torch.compile` without graph breaks. This folder needs only torch, and
may be copied into another project as it is.

How to add an op
----------------
An operator is two or three files with its name; nothing else knows it but the imports and `OPS` below. For `double_it`:

1. `double_it.py` holds, as upsample_argmax.py does, the reference, the public function, the schema and the fake:

       torch.library.define("ops_ext::double_it", "(Tensor x) -> Tensor")
       torch.library.register_fake("ops_ext::double_it", torch.empty_like)

       def double_it(x):
           if not has_kernels(x.device.type):
               return double_it_reference(x)
           return torch.ops.ops_ext.double_it(x)

   Errors for users are raised there. An operator to differentiate registers a backward: see upsample_cross_entropy.py.
2. `double_it.cpp` holds the kernel for the CPU, `double_it.cu` the one for CUDA, each with a registration at its foot:

       #include "common.h"
       using torch::stable::Tensor;
       Tensor double_it(const Tensor& x) { ... }
       STABLE_TORCH_LIBRARY_IMPL(ops_ext, CPU, m) { m.impl("double_it", TORCH_BOX(&double_it)); }

   Vectors come from simd.h, threads from torch::stable::parallel_for. Without a twin the other device has no kernel.
3. A case in tests/kernel_cases.py compares every kernel with plain PyTorch in float64, also under sanitizers.
"""

from __future__ import annotations

import torch

from .accelerate import IMAGENET_MEAN, IMAGENET_STD, accelerate, fast_precision
from .compiler import has_kernels
from .upsample_argmax import upsample_argmax, upsample_argmax_reference
from .upsample_cross_entropy import upsample_cross_entropy, upsample_cross_entropy_reference

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "accelerate",
    "fast_precision",
    "implementations",
    "upsample_argmax",
    "upsample_argmax_reference",
    "upsample_cross_entropy",
    "upsample_cross_entropy_reference",
]

OPS = ("upsample_argmax", "upsample_cross_entropy")


def implementations(device: torch.device | str | None = None) -> dict[str, str]:
    """What runs each op on this machine: op name -> "cpu", "cuda" (a compiled kernel) or "reference" (plain PyTorch).

    Compiles the kernels if that has not been done before.

    Args:
        device: the device in question; None for the accelerator where there is one, else the CPU.
    """
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device_type = torch.device(device).type
    return dict.fromkeys(OPS, device_type if has_kernels(device_type) else "reference")
