"""DeepSpeed: environment, generated configuration, and start of the process group."""

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class World:
    """Where this process stands in the job."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def prepare_environment() -> None:
    """Set what DeepSpeed reads at import. Call before the first `import deepspeed`.

    Without a GPU: the CPU accelerator with gloo, and the cores of the node shared among its ranks.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        local_size = int(
            os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
        )
        cores = len(os.sched_getaffinity(0))
        threads = int(os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // local_size))))
        torch.set_num_threads(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def start_process_group(timeout_s: float) -> World:
    """Join the job described by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Without these variables the job is this one process.
    """
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        os.environ.update(alone)
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    prepare_environment()
    import deepspeed

    # The CPU accelerator would otherwise compile a shared-memory all-reduce for minutes at first
    # use, and leave a lock behind if it is interrupted. gloo gives the same results.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(timeout=datetime.timedelta(seconds=timeout_s), verbose=False)
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), local_rank, device)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def deepspeed_config(
    *,
    global_batch: int,
    micro_batch: int,
    accumulation: int,
    precision: str,
    zero_stage: int,
    gradient_clipping: float,
    overrides: Mapping[str, Any],
) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`. overrides: merged in verbatim, and win."""
    config: dict[str, Any] = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": gradient_clipping,
        "steps_per_print": 10**9,
        "bf16": {"enabled": precision == "bf16"},
        # the optimiser is torch's, chosen in engine/optimizer.py: nothing is compiled at start
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": torch.cuda.is_available(),
            "stage3_gather_16bit_weights_on_model_save": True,
            # it would replace torch's linear for the rest of the process, models of others included
            "memory_efficient_linear": False,
        },
    }
    return _merged(config, overrides)


def _merged(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in overrides.items():
        mine = result.get(key)
        both = isinstance(mine, Mapping) and isinstance(value, Mapping)
        result[key] = _merged(mine, value) if both else value  # type: ignore[arg-type]
    return result
