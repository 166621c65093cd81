"""FSDP2 on CPUs too: accelerate shards on accelerators only, PyTorch wherever processes can talk.

Knows the two libraries' settings and nothing of training.
"""

from __future__ import annotations

import os

from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin


def asks_for_sharding() -> bool:
    """Whether the launcher asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


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
