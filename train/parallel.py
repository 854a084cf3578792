"""Ranks: process group, device, FSDP2 sharding (with replicas), sums over ranks, and full tensors for saving."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from soundwave_fast.errors import UserError


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    host_group: Any = None  # of gloo, for numbers of the host: over nccl they would wait for the device

    @property
    def main(self) -> bool:
        return self.rank == 0


def start() -> World:
    """Join torchrun's process group (nccl on GPU, gloo on CPU); a plain `python` run is a world of one.

    Raises:
        UserError: more ranks on this machine than it has GPUs, or an environment that torchrun did not make.
    """
    local, ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    if cuda and ranks > max(1, torch.cuda.device_count()):
        raise UserError(f"--nproc-per-node {ranks}: this machine shows {torch.cuda.device_count()} GPUs")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if cuda else "gloo")
        except ValueError as error:
            raise UserError(f"RANK is set, but the rest of torchrun's environment is not: {error}") from None
    if not dist.is_initialized():
        return World(0, 1, device)
    return World(dist.get_rank(), dist.get_world_size(), device, dist.new_group(backend="gloo"))


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def mixed_precision(setting: bool | str, dtype: torch.dtype) -> Any:
    """FSDP's policy: weights gathered (and multiplied) in `dtype`, gradients reduced in float32, masters untouched."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if setting is False or dtype == torch.float32:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)


def shard(model: nn.Module, world: World, replicate: int, shard_encoder: bool, policy: Any = None) -> None:
    """`fully_shard` in place: each layer of LLM and encoder, the rest with the root.

    Neither LLM nor encoder is a unit of its own: the wrapper uses the LLM's embedding before its forward runs, and
    the encoder's convolutions without its forward.
    `shard_encoder` must be False where ranks may skip the encoder (cached frames), or its collectives would not match.

    Args:
        replicate: HSDP: so many copies, each sharded over size / replicate neighbouring ranks.
        policy: see `mixed_precision`.

    Raises:
        UserError: replicas that do not divide the ranks.
    """
    if replicate < 1 or world.size % replicate:
        raise UserError(f"run.replicate: {replicate} does not divide {world.size} ranks")
    if world.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if replicate > 1:
        shape, names = (replicate, world.size // replicate), ("replicate", "shard")
    else:
        shape, names = (world.size,), ("shard",)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    more = {"mesh": mesh} if policy is None else {"mesh": mesh, "mp_policy": policy}
    ignored: set[nn.Parameter] = set()
    if shard_encoder:
        for layer in model.audio_tower.layers:
            fully_shard(layer, **more)
    else:
        ignored = set(model.audio_tower.parameters())
    if model.language_model is not None:
        for layer in model.causal_lm.model.layers:
            fully_shard(layer, **more)
    fully_shard(model, **more, ignored_params=ignored or None)


def reduce_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward sums gradients over ranks; of several accumulated batches only the last need do it."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(now)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Element-wise sum over ranks; in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def sum_on_host(values: Tensor, world: World) -> Tensor:
    """Element-wise sum over ranks of a tensor of the host; in place, and without a wait for the device."""
    if world.size > 1:
        dist.all_reduce(values, group=world.host_group)
    return values


def trained_state(model: nn.Module, also: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Full tensors of all trainable parameters, on rank 0's CPU (elsewhere possibly empty); a collective.

    Args:
        also: prefixes of parameters to gather even where they are frozen.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if not dist.is_initialized() or dist.get_world_size() == 1:
        wanted = ((name, p) for name, p in model.named_parameters() if p.requires_grad or name.startswith(also))
        return {name: p.detach().cpu() for name, p in wanted}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and name.startswith(also):
            full = parameter.detach().full_tensor()  # on every rank: a collective
            if dist.get_rank() == 0:
                state[name] = full.cpu()
    return state


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
