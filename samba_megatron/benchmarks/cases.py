"""The process that measures: one case after another, each with what the one before has given back.

python -m samba_megatron.benchmarks.cases DONE GIVEN PART…

is the child of :func:`samba_megatron.platform.trials.run_in_children`: what crashes or hangs costs
itself only.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from samba_megatron.benchmarks import fla_step, kernels, layers
from samba_megatron.benchmarks.plan import Plan
from samba_megatron.benchmarks.timing import copy_rate, is_out_of_memory, release_memory
from samba_megatron.ops.measuring import on_gpu
from samba_megatron.platform import distributed, matmul_rate
from samba_megatron.platform.findings import Finding, State
from samba_megatron.platform.hardware import device_name, node_name
from samba_megatron.platform.trials import Trial, serve

PACKAGES = (
    *("torch", "triton", "megatron-core", "transformer-engine", "mamba-ssm", "causal-conv1d"),
    *("flash-attn", "flash-linear-attention", "transformers"),
)


def main() -> None:
    """Measures the cases of the parts but for the first so many.

    Its arguments are that number, the fields that the plan is given (JSON), and the parts.
    """
    plan = Plan.for_machine(on_gpu(), **json.loads(sys.argv[2]))
    cases = [case for part in sys.argv[3:] for case in PARTS[part](plan)]
    serve([(area, name, partial(_alone, run)) for area, name, run in cases], int(sys.argv[1]))
    distributed.shutdown()


def _alone(run: Callable[[], Finding]) -> Finding:
    """A case with all memory to itself; where that does not suffice, a sentence says so."""
    release_memory()
    try:
        return run()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        problem = str(error).splitlines()[0]
    release_memory()
    raise MemoryError(f"memory did not suffice: {problem}")


def _machine(plan: Plan) -> Iterator[Trial]:
    yield "machine", "machine", measure_machine


def measure_machine() -> Finding:
    """The machine, what is installed on it, and what a copy and a large product reach."""
    rates, problems = matmul_rate.measure()
    if problems:
        return Finding("machine", "machine", State.BROKEN, "; ".join(problems))
    figures = {
        "date": str(date.today()),
        "node": node_name(),
        "device": device_name(),
        "on_gpu": on_gpu(),
        "cores": len(os.sched_getaffinity(0)),
        "copy_bytes_per_second": copy_rate(),
        "product_flops_per_second": rates[0]["tflops"] * 1e12,
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }
    return Finding("machine", "machine", State.OK, device_name(), figures=figures)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


PARTS: dict[str, Callable[[Plan], Iterator[Trial]]] = {
    "machine": _machine,
    "kernels": kernels.trials,
    "layers": layers.trials,
    "step": fla_step.trials,
}
"""Steps want a process of their own, whose memory is counted; this project's are :mod:`own_step`'s.
"""

if __name__ == "__main__":
    main()
