"""Distributed training with Lightning Fabric: one process, data-parallel, or with sharded parameters.

`vitrine train --devices 4` starts the processes itself. For several nodes start it with `torchrun`, which sets their
number: `torchrun --nnodes 2 --nproc-per-node 8 ... --no-python vitrine train --recipe ...`. Sharding (PyTorch's FSDP2,
one unit per encoder and per decoder) is for CLTs whose weights, gradients and moments do not fit on one device;
checkpoints are the same either way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from vitrine.models.dictionary.clt import Decoder
from vitrine.models.dictionary.encoder import Encoder
from vitrine.models.dictionary.residual_sae import SaeDecoder
from vitrine.models.errors import VitrineError
from vitrine.models.stopping import Stopped


class ParallelError(VitrineError, ValueError):
    """The requested devices are not available; the message says which are."""


def make_fabric(
    devices: int = 1,
    shard: bool = False,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    accelerator: str = "auto",
) -> Fabric:
    """Fabric with `devices` processes, or under torchrun with those it started. `auto`: a GPU if available.

    Raises `ParallelError` for devices that do not exist.
    """
    nodes = 1
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has started the processes and sets their number
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    if accelerator not in ("auto", "cuda", "cpu"):
        raise ParallelError(f"accelerator {accelerator!r} is not one of auto, cuda, cpu")
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cuda" and devices > torch.cuda.device_count():
        raise ParallelError(f"--devices is {devices}, but {torch.cuda.device_count()} GPUs were found")
    processes = devices * nodes
    strategy: Strategy | str = "auto"
    if shard:
        if processes == 1:
            raise ParallelError("weights cannot be sharded on one device; give --devices 2 or more")
        strategy = ModelParallelStrategy(_shard, data_parallel_size=processes, tensor_parallel_size=1)
    elif processes > 1:
        strategy = DDPStrategy()
    return Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes, strategy=strategy, precision=precision)


@contextmanager
def one_report(fabric: Fabric) -> Iterator[None]:
    """Where another process of the run has ended, say that and no more: the reason is its own to report.

    Raises `ParallelError` in place of what torch.distributed raises when a connection is lost. That all were told to
    stop is the first process's to report: the others end with status 0, for Fabric kills all when one fails.
    """
    try:
        yield
    except Stopped:
        if fabric.is_global_zero:
            raise
        raise SystemExit(0) from None
    except RuntimeError as error:  # of which torch's DistError is a kind; gloo raises it as it is
        lost = isinstance(error, torch.distributed.DistError) or re.search(r"Connection (closed|reset)", str(error))
        if fabric.world_size == 1 or not lost:
            raise
        raise ParallelError(
            f"process {fabric.global_rank} stops because another process of this run has ended"
        ) from error


def signal_of_any(fabric: Fabric, number: int | None) -> int | None:
    """The signal that told this process, or any other one of the run, to stop after this step; None: there was none.

    Every process must call this after the same step."""
    if fabric.world_size == 1:
        return number
    told: Any = fabric.all_reduce(torch.tensor(number or 0, device=fabric.device), reduce_op="max")
    return int(told) or None


def _shard(module: nn.Module, mesh: Any) -> nn.Module:
    for part in module.modules():
        if isinstance(part, Encoder | Decoder | SaeDecoder):
            fully_shard(part, mesh=mesh["data_parallel"])
        if isinstance(part, Encoder | SaeDecoder):
            register_fsdp_forward_method(part, "of_features")
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}  # the CLIP
    fully_shard(module, mesh=mesh["data_parallel"], ignored_params=frozen)
    return module


def gathered(tensor: Tensor) -> Tensor:
    """A possibly sharded tensor, gathered on every process, on the CPU."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def like(tensor: Tensor, example: Tensor) -> Tensor:
    """An unsharded tensor, moved to the device of `example` and sharded like it."""
    tensor = tensor.to(example.device)
    if isinstance(example, DTensor) and tensor.shape == example.shape:
        return distribute_tensor(tensor, example.device_mesh, example.placements)
    return tensor
