"""Starts a run: the light part, before megatron is imported.

Order matters here. Signals are heeded first, since one that comes during the slow imports must not
kill the run; then the configuration is checked, which needs no library; then the CPU shim, if
there is no GPU, goes in before megatron.
"""

import dataclasses
import gc
import signal
import time
from contextlib import nullcontext
from pathlib import Path

from samba_megatron.config import RunConfig
from samba_megatron.config.checks import check_config
from samba_megatron.platform import distributed
from samba_megatron.platform.exits import ExitCode
from samba_megatron.training.endings import RunLog
from samba_megatron.training.signals import StopRequest

_SECONDS_TO_LEAVE = 60


def train(config: RunConfig) -> ExitCode:
    """Runs a configuration to its end, or until it is asked to stop.

    Returns:
        DONE when all steps are done; REQUEUE when stopped early with the state saved; HOLD or
        BAD_NODE when a step was not finite.

    Raises:
        UserError: for wrong input, before the first step.
    """
    config = resolve_paths(config)
    log = RunLog(Path(str(config.run_dir)), Path(str(config.checkpoint.save)))
    with log.failures_recorded():
        code = _train(config, log)
    gc.enable()
    gc.collect()
    return code


def _train(config: RunConfig, log: RunLog) -> ExitCode:
    stop = StopRequest(config.training.exit_signals)
    start = time.perf_counter()
    rank = join_world(config)
    phases = {"imports and world": time.perf_counter() - start}

    from samba_megatron.training.graphed_schedule import recordable

    with recordable() if config.kernels.uses_graph else nullcontext():
        code = _run(config, rank, phases, stop, log)
    # Not after an exception: the peers may be anywhere, and leaving together would wait for them.
    distributed.leave_layout()
    return code


def _run(
    config: RunConfig,
    rank: distributed.Rank,
    phases: dict[str, float],
    stop: StopRequest,
    log: RunLog,
) -> ExitCode:
    from samba_megatron.training.loop import Loop
    from samba_megatron.training.setup import set_up

    run = set_up(config, rank, phases)
    loop = Loop(run, stop, log)
    try:
        return loop.run_to_end()
    except BaseException as error:
        loop.watchdog.judge(error)
        _end_in_any_case()
        raise
    finally:
        run.console.stop()
        loop.watchdog.stop()


def _end_in_any_case() -> None:
    """A failed process must go, so that the launcher ends its peers: where the libraries' clean-up
    waits for those, the kernel ends it."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_SECONDS_TO_LEAVE)


def join_world(config: RunConfig) -> distributed.Rank:
    """Checks the configuration against the world that the launcher made, and joins it."""
    rank = distributed.Rank.from_environment()
    distributed.keep_queued_order(config.parallel)
    device_type, devices = distributed.available_devices()
    check_config(config, rank.world_size, device_type, devices, rank.local_world_size)
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
