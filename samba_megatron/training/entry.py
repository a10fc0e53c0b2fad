"""Starts a run: the light part, before megatron is imported.

Order matters here. Signals are heeded first, since one that comes during the slow imports must not
kill the run; then the configuration is checked, which needs no library; then the CPU shim, if
there is no GPU, goes in before megatron.
"""

import dataclasses
import time
from pathlib import Path

from samba_megatron.config import RunConfig
from samba_megatron.config.checks import check_config
from samba_megatron.platform import distributed
from samba_megatron.platform.exits import ExitCode
from samba_megatron.training.signals import StopRequest


def train(config: RunConfig) -> ExitCode:
    """Runs a configuration to its end, or until it is asked to stop.

    Returns:
        DONE when all steps are done; REQUEUE when stopped early with the state saved; HOLD or
        BAD_NODE when a step was not finite.

    Raises:
        UserError: for wrong input, before the first step.
    """
    stop = StopRequest(config.training.exit_signals)
    start = time.perf_counter()
    config = resolve_paths(config)
    rank = join_world(config)
    phases = {"imports and world": time.perf_counter() - start}

    from samba_megatron.training.loop import Loop
    from samba_megatron.training.setup import set_up

    run = set_up(config, rank, phases)
    try:
        return Loop(run, stop).run_to_end()
    finally:
        run.console.stop()
        distributed.leave_layout()


def join_world(config: RunConfig) -> distributed.Rank:
    """Checks the configuration against the world that the launcher made, and joins it."""
    from samba_megatron.model.backend import choose_implementation

    rank = distributed.Rank.from_environment()
    device_type, devices = distributed.available_devices()
    check_config(config, rank.world_size, device_type, devices, rank.local_world_size)
    choose_implementation(config.kernels.transformer_impl, device_type)
    return distributed.initialize(config.parallel)


def resolve_paths(config: RunConfig) -> RunConfig:
    """Fills in the folders that follow from ``run_dir``: checkpoints and dataset indices."""
    run_dir = Path(config.run_dir or Path("runs") / config.name)
    checkpoint = config.checkpoint
    save = checkpoint.save or str(run_dir / "checkpoints")
    cache = config.data.path_to_cache or str(run_dir / "index_cache")
    return dataclasses.replace(
        config,
        run_dir=str(run_dir),
        checkpoint=dataclasses.replace(checkpoint, save=save),
        data=dataclasses.replace(config.data, path_to_cache=cache),
    )
