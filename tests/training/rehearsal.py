"""A graphed run without a GPU: a recording is the function itself, run again at each replay. What
CUDA would not notice is noticed here: that something which was recorded lies elsewhere by now."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from megatron.core.utils import get_model_config
from torch import Tensor

from samba_megatron.config import checks
from samba_megatron.config.rules import graphs
from samba_megatron.platform.exits import ExitCode
from samba_megatron.training import loop
from samba_megatron.training.entry import train
from samba_megatron.training.graphed_schedule import GraphedSchedule
from samba_megatron.training.micro_batch import FIELDS, MicroBatch
from samba_megatron.training.schedule import Reports
from tests.distributed.run_layouts import configure

GRAPHED = {
    "kernels.cuda_graph_impl": "full_iteration",
    "parallel.overlap_grad_reduce": False,
    "parallel.overlap_param_gather": False,
}


class Rehearsal(GraphedSchedule):
    """A process's schedule, and what became of it."""

    def __init__(self) -> None:
        super().__init__(self._keep)
        self.calls = self.replayed = 0
        self.recorded_at: list[int] = []
        """At which calls."""
        self.micro_batches: list[int] = []
        """In each recording."""
        self.faults: list[str] = []
        """What was timed in a recording, or lay elsewhere in a replay. Only noted: a run that fails
        is to end its process."""

    def __call__(self, chunks: Any, iterators: Any, num_microbatches: int, *sizes: int) -> Reports:
        self.calls += 1
        self._chunk, self._number = chunks[0], num_microbatches
        return super().__call__(chunks, iterators, num_microbatches, *sizes)

    def _keep(self, run: Callable[[], Reports]) -> tuple[Reports, Callable[[], None]]:
        """As a CUDA graph: nothing is computed before the first replay."""
        self.recorded_at.append(self.calls)
        self.micro_batches.append(self._number)
        config = get_model_config(self._chunk)
        if config.timers is not None:
            self.faults.append(f"call {self.calls} is timed")
        reports: Reports = []
        put_off, recorded = config.finalize_model_grads_func, self._places()

        def replay() -> None:
            self.replayed += 1
            places = self._places()
            self.faults += [
                f"{name} has moved before call {self.calls}"
                for name in recorded.keys() | places.keys()
                if recorded.get(name) != places.get(name)
            ]
            with as_recorded(config, put_off):
                reports[:] = run()

        return reports, replay

    def _places(self) -> dict[str, int]:
        """The address of everything that kernels of a recording read or write and that others hand
        to them, by its name."""
        assert self._inputs is not None
        places = {}
        for name, weight in self._chunk.named_parameters():
            places[name] = weight.data_ptr()
            places[f"gradient of {name}"] = weight.main_grad.data_ptr()
        for name, buffer in self._chunk.named_buffers():
            places[name] = buffer.data_ptr()
        for number, micro_batch in enumerate(self._inputs.micro_batches):
            for name, tensor in inputs_of(micro_batch):
                places[f"{name} of micro-batch {number}"] = tensor.data_ptr()
        return places


@contextmanager
def as_recorded(config: Any, put_off: Callable[..., None]) -> Iterator[None]:
    """Inside, the config is as it was when the graph was recorded."""
    now = config.finalize_model_grads_func, config.timers
    config.finalize_model_grads_func, config.timers = put_off, None
    yield
    config.finalize_model_grads_func, config.timers = now


def inputs_of(micro_batch: MicroBatch) -> Iterator[tuple[str, Tensor]]:
    """What a micro-batch has on the device: not ``document_start``, of which kernels know
    nothing."""
    for name in FIELDS:
        if (tensor := getattr(micro_batch, name)) is not None:
            yield name, tensor
    sequence = micro_batch.sequence
    if sequence is None:
        return
    assert sequence.reset is not None
    yield "reset", sequence.reset
    for stretch, packed in sequence._packed.items():
        yield f"query_ends {stretch}", packed.query_ends
        yield f"key_ends {stretch}", packed.key_ends


def launched(config: dict[str, Any]) -> None:
    """Runs a configuration kernel by kernel."""
    assert train(configure(config)) == ExitCode.DONE


def rehearsed(config: dict[str, Any], code: ExitCode = ExitCode.DONE) -> Rehearsal:
    """Runs a configuration with a graph; how that came about. Nothing recorded may have moved."""
    rehearsal = Rehearsal()
    # That a graph needs a GPU is among these rules.
    rules = tuple(rule for rule in checks.RULES if rule not in graphs.RULES)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "GraphedSchedule", lambda: rehearsal)
        patched.setattr(checks, "RULES", rules)
        assert train(configure({**config, **GRAPHED})) == code
    assert not rehearsal.faults, rehearsal.faults[:5]
    return rehearsal
