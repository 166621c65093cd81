"""FSDP2 on CPUs too: accelerate shards on accelerators only, PyTorch wherever processes can talk.

Knows the two libraries' settings and nothing of training.
"""

from __future__ import annotations

import os

from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule

from modernbert_decoder.errors import InputError


def asks_for_sharding() -> bool:
    """Whether the launcher asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_sharding(device_type: str) -> None:
    """Refuses what accelerate would fail at while it starts.

    Raises:
        InputError: the launcher asks for the first FSDP, and there are only CPUs.
    """
    version = os.environ.get("FSDP_VERSION", "1")  # as accelerate takes it
    if asks_for_sharding() and device_type == "cpu" and version != "2":
        raise InputError(
            f"the launcher asks for FSDP version {version}, which shards on accelerators only; launch with "
            "`--fsdp_version 2`"
        )


def shard_on_cpu(accelerator: Accelerator) -> bool:
    """Make CPU processes that were to be replicas shard the model; whether there was anything to do.

    accelerate leaves the launcher's wish for FSDP unheeded on CPUs. The rest of its code for FSDP2 does not
    care for the kind of device.
    """
    if not asks_for_sharding() or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return False
    plugin = FullyShardedDataParallelPlugin()
    state = accelerator.state
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.fsdp_plugin = plugin
    state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return True


def is_sharded(model: nn.Module) -> bool:
    """Whether several processes hold a model's weights together."""
    return isinstance(model, FSDPModule)
