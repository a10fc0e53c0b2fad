"""What test_two_ranks runs on two ranks: saving, resuming, and every layout of two ranks.

Writes what it found to ``results.json``.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from samba_megatron.config import RunConfig
from samba_megatron.platform import distributed
from tests.checkpoint.tiny_run import STEPS, TinyRun, start, store_in, tiny_config, whole_tensors

PATTERN = "M-*- x2"
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}


def main(folder: Path) -> None:
    config = tiny_config(pattern=PATTERN)
    start(config)
    results: dict[str, Any] = {"fp32": uninterrupted(config, folder / "dp2")}
    results["resumed"] = {
        str(step): resumed(config, folder / "dp2", step) for step in (2, 3, STEPS)
    }
    bf16 = tiny_config("bf16", pattern=PATTERN)
    results["bf16"] = uninterrupted(bf16, folder / "bf16")
    results["bf16 resumed"] = resumed(bf16, folder / "bf16", 3)
    for name, sizes in LAYOUTS.items():
        results[name] = relaid(tiny_config(pattern=PATTERN, **sizes), folder, name)
    results["back"] = back(config, folder)
    if torch.distributed.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    distributed.shutdown()


def uninterrupted(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Saves at steps 2 (in the background, training on), 3 and at the end."""
    notices: list[str] = []
    run = TinyRun(config)
    store = store_in(folder, notices)
    store.preflight(run.state)
    run.train(2)
    assert store.save(run.state) is None
    losses = run.train(3)
    report = store.wait()
    assert store.poll() is None
    blocking = store.save(run.state, blocking=True)
    at_3, draws = run.fingerprint(), draw()
    losses += run.train(STEPS)
    store.save(run.state)
    again = store.save(run.state)  # waits for the first, has nothing to do
    store.close()
    return {
        "losses": losses,
        "fingerprint": run.fingerprint(),
        "at 3": at_3,
        "draws": draws,
        "report": [report.step, report.path.name, report.bytes, report.stall_seconds],
        "blocking": [blocking.step, blocking.stall_seconds > blocking.write_seconds > 0],
        "again": again,
        "notices": notices,
    }


def resumed(config: RunConfig, folder: Path, step: int) -> dict[str, Any]:
    """Loads a step into a fresh run and goes on to the end."""
    if torch.distributed.get_rank() == 0:
        (folder / "latest").write_text(f"step_{step:07d}\n")
    torch.distributed.barrier()
    notices: list[str] = []
    run = TinyRun(config)
    torch.manual_seed(99)
    progress = run.load(store_in(folder, notices))
    draws = draw()
    return {
        "progress": [progress.step, progress.consumed_samples, progress.data_identity],
        "draws": draws,
        "losses": run.train(STEPS),
        "fingerprint": run.fingerprint(),
        "notices": notices,
    }


def relaid(config: RunConfig, folder: Path, name: str) -> dict[str, Any]:
    """Loads step 3 of DP2 in another layout, saves it there, and trains on."""
    lay_out(config)
    notices: list[str] = []
    run = TinyRun(config)
    source = folder / "dp2" / "step_0000003"
    store = store_in(folder / name, notices, load=str(source))
    run.load(store)
    store.save(run.state, blocking=True)
    differ = []
    if torch.distributed.get_rank() == 0:
        there, here = whole_tensors(source), whole_tensors(folder / name / "step_0000003")
        differ = [key for key in there if not torch.equal(there[key], here[key])]
        differ += sorted(there.keys() ^ here.keys())
    return {"differ": differ, "losses": run.train(STEPS), "notices": notices}


def back(config: RunConfig, folder: Path) -> str:
    """DP2 again, from the interleaved pipeline's checkpoint: the fingerprint."""
    lay_out(config)
    run = TinyRun(config)
    run.load(store_in(folder / "vpp2"))
    return run.fingerprint()


def lay_out(config: RunConfig) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.parallel.virtual_pipeline_model_parallel_size,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(1)


def draw() -> list[float]:
    """The next number of every generator."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        named = torch.rand(()).item()
    return [random.random(), float(np.random.rand()), torch.rand(()).item(), named]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
