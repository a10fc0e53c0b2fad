"""What test_reshard runs on two ranks: trains TP 2, rewrites the checkpoint, and goes on in DP 2
from the original and from each copy. Writes what it found to ``results.json``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from samba_megatron.checkpoint.reshard import ReshardOptions, reshard
from samba_megatron.config import RunConfig
from samba_megatron.platform import distributed
from samba_megatron.platform.errors import UserError
from tests.checkpoint.tiny_run import STEPS, TinyRun, start, store_in, tiny_config
from tests.checkpoint.two_ranks import lay_out

COPIES: dict[str, dict[str, Any]] = {
    "whole": {"file_bytes": 100_000},
    "weights": {"weights_only": True},
    "half": {"weights_only": True, "dtype": torch.bfloat16},
}


def main(folder: Path) -> None:
    config = tiny_config(pattern="M-*- x2", tensor_model_parallel_size=2)
    start(config)
    run = TinyRun(config)
    run.train(3)
    store = store_in(folder / "saved")
    store.save(run.state, blocking=True)
    if torch.distributed.get_rank() == 0:
        for name, options in COPIES.items():
            reshard(ReshardOptions(folder / "saved", folder / name, **options), lambda text: None)
    torch.distributed.barrier()
    config = tiny_config(pattern="M-*- x2")
    lay_out(config)
    results = {name: resumed(config, folder / name) for name in ("saved", "whole")}
    for name in ("saved", "weights", "half"):
        results[f"from {name}"] = begun(config, folder / name)
    results["refused"] = refusal(config, folder / "weights")
    if torch.distributed.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    distributed.shutdown()


def resumed(config: RunConfig, checkpoint: Path) -> Any:
    """Losses of the steps that follow, and the state at the end."""
    run = TinyRun(config)
    run.load(store_in("", load=str(checkpoint)))
    return [run.train(STEPS), run.fingerprint()]


def begun(config: RunConfig, checkpoint: Path) -> Any:
    """Losses of the first steps from the weights alone."""
    run = TinyRun(config)
    run.load(store_in("", load=str(checkpoint), load_weights_only=True))
    return run.train(2)


def refusal(config: RunConfig, checkpoint: Path) -> str:
    """What is said when the optimizer is asked for."""
    try:
        TinyRun(config).load(store_in("", load=str(checkpoint)))
    except UserError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
