"""One model spread over the processes that train it: each keeps a slice of every parameter, gradient and moment.

A block is brought together while it computes, and let go of afterwards. What stands in the states and in the checkpoint
is whole, so that any number of processes can go on with it.

Source: Zhao et al., PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel; its second version in torch.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .tasks import Task, named_blocks


def shard(task: Task, device: torch.device) -> Task:
    """Spread the parameters of a task, which may still be in main memory, over all processes; by all of them.

    Numbers, as ITC's temperature, cannot be cut: each process keeps them, and `average_whole` their gradients.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    whole = {parameter for parameter in task.parameters() if not parameter.ndim}
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for _, block in named_blocks(task):
        fully_shard(block, mesh=mesh)
    fully_shard(task, mesh=mesh, ignored_params=whole)
    return task


def full(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread; by all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's slice of a tensor that every process has, cut as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def average_whole(task: Task) -> None:
    """Average the gradients that are not spread over the processes."""
    for parameter in task.parameters():
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


@torch.no_grad()
def bring_together(task: Task, keep: bool) -> None:
    """Put whole parameters, in main memory, in the place of slices where `keep`; by all processes, before saving."""
    whole: dict[Tensor, nn.Parameter] = {}  # tied parameters stay tied
    for module in task.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                if parameter not in whole:
                    value = parameter.full_tensor()
                    whole[parameter] = nn.Parameter(value.cpu() if keep else torch.empty(0), parameter.requires_grad)
                module._parameters[name] = whole[parameter]
