"""How a run is spread over devices, by Lightning Fabric: one process, data-parallel, or with sharded parameters.

`vitrine train --devices 4` starts the processes itself; for several nodes start it with `torchrun`, which says how
many there are: `torchrun --nnodes 2 --nproc-per-node 8 ... -m vitrine train --recipe ...`. Sharding
(PyTorch's FSDP2, one unit an encoder and a decoder) is for CLTs whose weights, gradients and moments do not fit one
device; what is saved is the same either way.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vitrine.models.dictionary.clt import Decoder, Encoder
from vitrine.models.errors import VitrineError


class ParallelError(VitrineError, ValueError):
    """The wanted devices are not there; the message says what is."""


def make_fabric(
    devices: int = 1,
    shard: bool = False,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    accelerator: str = "auto",
) -> Fabric:
    """Fabric over `devices` processes; under torchrun over its own. `auto`: a GPU if there is one.

    Raises `ParallelError` for devices that there are not.
    """
    nodes = 1
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has started the processes, and knows how many
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    if accelerator not in ("auto", "cuda", "cpu"):
        raise ParallelError(f"accelerator {accelerator!r} is none of auto, cuda, cpu")
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cuda" and devices > torch.cuda.device_count():
        raise ParallelError(f"{devices} GPUs wanted, {torch.cuda.device_count()} found")
    processes = devices * nodes
    strategy: Strategy | str = "auto"
    if shard:
        if processes == 1:
            raise ParallelError("parameters can be sharded over two devices or more, not over one")
        strategy = ModelParallelStrategy(_shard, data_parallel_size=processes, tensor_parallel_size=1)
    elif processes > 1:
        strategy = DDPStrategy()
    return Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes, strategy=strategy, precision=precision)


def _shard(module: nn.Module, mesh: Any) -> nn.Module:
    for part in module.modules():
        if isinstance(part, Encoder | Decoder):
            fully_shard(part, mesh=mesh["data_parallel"])
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}  # the CLIP
    fully_shard(module, mesh=mesh["data_parallel"], ignored_params=frozen)
    return module


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, put together on every process, on the CPU."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def like(tensor: Tensor, example: Tensor) -> Tensor:
    """A whole tensor, placed and sharded as `example` is."""
    tensor = tensor.to(example.device)
    if isinstance(example, DTensor) and tensor.shape == example.shape:
        return distribute_tensor(tensor, example.device_mesh, example.placements)
    return tensor
