"""An accelerator that lacks what NPUs lack: a stand-in, with tensors on the CPU, refuses what torch_npu refuses."""

import contextlib
import types
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode

import eval as evaluation
import launch
import train
from conftest import last_json, run_ranks
from data import DataError
from launch import exit_status
from model import CheckpointError, FastSCNN, read_checkpoint
from ops_ext import accelerate
from tools import predict

NPU = "privateuseone"  # PyTorch's name for a device type that it does not know


def is_npu(value) -> bool:
    return isinstance(value, torch.device | str) and str(value).startswith(NPU)


class OnTheCPU(TorchFunctionMode):
    """Functions that are given the stand-in run on the CPU, but for those that it lacks."""

    def __torch_function__(self, function, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not torch.device and any(map(is_npu, [*args, *kwargs.values()])):
            if torch.channels_last in [*args, *kwargs.values()]:
                raise RuntimeError("channels_last: only contiguous tensors exist on this device")
            args = [torch.device("cpu") if is_npu(value) else value for value in args]
            kwargs = {name: torch.device("cpu") if is_npu(value) else value for name, value in kwargs.items()}
        return function(*args, **kwargs)


class SyncBatchNorm(nn.BatchNorm2d):
    """Over one process; PyTorch's own takes no tensors of the CPU."""

    @classmethod
    def convert_sync_batchnorm(cls, model):
        for module in model.modules():
            module.__class__ = cls if isinstance(module, nn.BatchNorm2d) else module.__class__
        return model

    def forward(self, x):
        if x.dtype == torch.bfloat16:
            raise RuntimeError("SyncBatchNorm takes float16 and float32")
        return super().forward(x)


class FallsBackToTheCPU(torch.optim.SGD):
    """Not refused, but slow."""

    def step(self, closure=None):
        if self.defaults["fused"]:
            warnings.warn("_fused_sgd_ is not supported on this device and falls back to the CPU", stacklevel=2)
        return super().step(closure)


@contextlib.contextmanager
def stand_in():
    """The accelerator of this process is the stand-in."""
    all_reduce, start, new_group, autocast = dist.all_reduce, dist.init_process_group, dist.new_group, torch.autocast
    wrap, scaler, bound = nn.parallel.DistributedDataParallel, torch.amp.GradScaler, []

    def reduce(tensor, *args, **kwargs):
        if tensor.dtype == torch.float64:
            raise RuntimeError("all_reduce of float64 is not supported on this device")
        return all_reduce(tensor, *args, **kwargs)

    def init_process_group(*args, **kwargs):
        bound.append(kwargs.pop("device_id", None))
        return start(*args, **kwargs)

    def side_group(*args, **kwargs):
        if bound[-1]:
            raise RuntimeError("no gloo group beside one that is bound to a device")
        return new_group(*args, **kwargs)

    def data_parallel(model, device_ids, **kwargs):
        assert device_ids == [int(launch.os.environ["LOCAL_RANK"])]
        return wrap(model, None, **kwargs)

    module = types.ModuleType("torch.npu")  # without get_device_name and mem_get_info
    patches = [
        mock.patch.object(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device(NPU)),
        mock.patch.object(torch.accelerator, "device_count", lambda: 2),
        mock.patch.object(torch.accelerator, "set_device_index", lambda _: None),
        mock.patch.object(torch.accelerator, "is_available", lambda: False),  # for pinned memory
        mock.patch.object(torch, "get_device_module", lambda _=None: module),
        mock.patch.object(torch, "autocast", lambda _, *args, **kwargs: autocast("cpu", *args, **kwargs)),
        mock.patch.object(torch.amp, "GradScaler", lambda _, *args, **kwargs: scaler("cpu", *args, **kwargs)),
        mock.patch.object(torch.optim, "SGD", FallsBackToTheCPU),
        mock.patch.object(nn, "SyncBatchNorm", SyncBatchNorm),
        mock.patch.object(nn.parallel, "DistributedDataParallel", data_parallel),
        mock.patch.object(dist, "get_default_backend_for_device", lambda _: "gloo"),
        mock.patch.object(dist, "all_reduce", reduce),
        mock.patch.object(dist, "init_process_group", init_process_group),
        mock.patch.object(dist, "new_group", side_group),
        OnTheCPU(),
    ]
    with contextlib.ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        yield


def test_tensors_are_contiguous_where_there_is_nothing_else():
    with stand_in():
        assert launch.memory_format(torch.device(NPU)) is torch.contiguous_format
        assert launch.memory_format(torch.device("cpu")) is torch.channels_last


def test_the_optimiser_is_fused_only_where_the_device_does_that_itself():
    assert launch.has_fused_sgd(torch.device("cpu"))
    with stand_in(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not launch.has_fused_sgd(torch.device(NPU))


def test_bfloat16_is_not_chosen_where_batch_normalisation_cannot_synchronise_it():
    with stand_in():
        assert not launch.syncs_batch_norm(torch.device(NPU), torch.bfloat16)
        assert launch.syncs_batch_norm(torch.device(NPU), torch.float16)


def test_a_device_without_channels_last_runs_the_accelerated_network():
    with stand_in():
        labels = accelerate(FastSCNN(5), device=NPU)(torch.zeros(1, 64, 96, 3, dtype=torch.uint8))
    assert labels.shape == (1, 64, 96)


def test_a_device_without_a_name_is_named_by_its_type():
    with stand_in():
        assert launch.name_of(torch.device(NPU)) == NPU


def on_the_stand_in(main, argv):
    """The exit status of a script's main function there."""
    with stand_in():
        return exit_status(lambda: main(argv), (DataError, CheckpointError))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_stand_in_trains_resumes_evaluates_and_predicts(drawn, tmp_path, processes):
    out, flags = tmp_path / "run", ["--data", str(drawn), "--workers", "0"]
    training = [*flags, "--out", str(out), "--batch-size", "6", "--crop-size", "64", "96"]
    weights = ["--weights", str(out / "checkpoints/best_model.pth")]
    pictures = [str(drawn / "leftImg8bit/val"), "--out", str(tmp_path / "pictures")]

    def run(main, argv):
        statuses, output = run_ranks(tmp_path, on_the_stand_in, main, argv, world_size=processes)
        assert statuses == [0] * processes, output
        return output

    output = run(train.main, [*training, "--epochs", "1"])
    precision = "bf16" if processes == 1 else "fp16"  # SyncBatchNorm takes no bfloat16
    assert f"device {NPU}:0  precision {precision}  ops" in output and "no SyncBatchNorm" not in output
    assert "_fused_sgd_" not in output
    output = run(train.main, [*training, "--epochs", "2", "--resume", "auto"])
    assert "after epoch 1; changed: epochs 1 -> 2" in output
    assert read_checkpoint(out / "checkpoints/2.pth")["epoch"] == 2
    result = last_json(run(evaluation.main, [*weights, *flags, "--amp", "auto"]))
    assert result["images"] == 5 and result["miiou"] is not None
    assert last_json(run(predict.main, [*weights, *pictures]))["images"] == 5
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == 5
