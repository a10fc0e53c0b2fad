"""``run_layouts.py`` on data with bad places; and a look at the weights where a step is skipped.

Each specification may have ``"nan"`` and ``"absurd"``, lists of samples by their place in the run's
order: the loss of the former is not a number, the latter are text that no model would expect.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from samba_megatron.platform import distributed
from samba_megatron.training import loop
from samba_megatron.training.spikes import GradNorm, SpikeGuard, watch_grad_norm
from tests.distributed.run_layouts import configure

BAD: dict[str, set[int]] = {"nan": set(), "absurd": set()}


def break_samples(stream_class: Any) -> None:
    """Has the stream deliver the bad samples of :data:`BAD`."""
    healthy = stream_class._read

    def read(self: Any, position: int) -> Any:
        batch = healthy(self, position)
        first = position + self._rank * self._micro_batch_size
        for row in range(self._micro_batch_size):
            if first + row in BAD["nan"]:
                batch["loss_mask"][row] = float("nan")
            if first + row in BAD["absurd"]:
                batch["tokens"][row], batch["labels"][row] = 1, 3
        return batch

    stream_class._read = read


def watch_weights() -> None:
    """Fails where a skipped step has changed a weight of the optimizer."""
    seen: dict[str, Any] = {}

    def watch(optimizer: Any, check: Any = None) -> GradNorm:
        seen["optimizer"] = optimizer
        return watch_grad_norm(optimizer, check)

    def weights() -> float:
        groups = seen["optimizer"].param_groups
        return float(sum(p.double().abs().sum() for group in groups for p in group["params"]))

    taken, skipped = SpikeGuard.taken, SpikeGuard.skipped

    def after_taken(self: SpikeGuard, loss: float, grad_norm: float) -> None:
        seen["weights"] = weights()
        taken(self, loss, grad_norm)

    def after_skipped(self: SpikeGuard) -> None:
        assert seen.get("weights", weights()) == weights()
        skipped(self)

    loop.watch_grad_norm = watch
    SpikeGuard.taken, SpikeGuard.skipped = after_taken, after_skipped  # type: ignore


def main() -> None:
    """Runs every specification in order."""
    from samba_megatron.data.stream import SampleStream
    from samba_megatron.training.entry import train

    break_samples(SampleStream)
    watch_weights()
    for spec in json.loads(Path(sys.argv[1]).read_text()):
        print(f"=== {spec['name']}", flush=True)
        BAD.update(nan=set(spec.get("nan", [])), absurd=set(spec.get("absurd", [])))
        code = train(configure(spec["config"]))
        assert int(code) == spec.get("exit_code", 0), (spec["name"], code)
    torch.distributed.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    main()
