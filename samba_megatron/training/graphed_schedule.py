"""Forward and backward of a step as one CUDA graph: the device needs no word from Python between
its kernels.

A small micro-batch takes the device less time than Python takes to launch its kernels. So they are
recorded once, with their addresses: everything that a step reads lies in the same memory at every
step (:class:`StaticInputs`), and what Python decides in between is decided once. Gradients are
cleared before and reduced over ranks after the graph, by the ordinary code; the update is not part
of it either.

Recorded anew when the number of micro-batches or their shape changes, or when a batch has more
documents than there was room for. A replay gives the same numbers as the kernels launched one by
one; what is recorded is what megatron's schedule does, and its name for this is
``cuda_graph_impl: full_iteration``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from megatron.core.utils import get_model_config
from torch import Tensor

from samba_megatron.data.stream import Batch
from samba_megatron.training.micro_batch import FIELDS, MicroBatch, on_device
from samba_megatron.training.schedule import Reports, lies_end_to_end, run_schedule

if TYPE_CHECKING:
    from torch import nn

_WARM_UP = 2
"""Steps from Python before recording: kernels are chosen and compiled, buffers are made."""
_LEAST_ROOM = 32


class Recorder(Protocol):
    """Records what a function has the device do."""

    def __call__(self, run: Callable[[], Reports]) -> tuple[Reports, Callable[[], Any]]:
        """(what ``run`` returned, what does the same again into the same memory)."""
        ...


def record_cuda_graph(run: Callable[[], Reports]) -> tuple[Reports, Callable[[], Any]]:
    """By a CUDA graph. Nothing is computed until the first replay."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may use CUDA meanwhile (the reader of data pins memory).
    stream = torch.cuda.current_stream()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        reports = run()
    return reports, graph.replay


@contextmanager
def recordable() -> Iterator[None]:
    """Inside, this thread's kernels go to a stream of their own: CUDA records none of the default
    one, and autograd remembers on which stream a weight was made."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    stream.wait_stream(before)
    torch.cuda.set_stream(stream)
    try:
        yield
    finally:
        before.wait_stream(stream)
        torch.cuda.set_stream(before)


class StaticInputs:
    """The micro-batches of a step, at every step in the same memory.

    Args:
        batches: of the first step, [b, s] each.
        end_to_end: whether their sequences lie end to end.
    """

    def __init__(self, batches: Sequence[Batch | None], end_to_end: bool) -> None:
        self._shapes = [_shapes(batch) for batch in batches]
        self._room = _room(max(map(_documents, batches)))
        self.micro_batches = [on_device(batch, end_to_end) for batch in batches]
        for micro_batch in self.micro_batches:
            if micro_batch.sequence is not None:
                micro_batch.sequence.room = self._room

    def fits(self, batches: Sequence[Batch | None]) -> bool:
        """Whether :meth:`fill` can take these."""
        return [_shapes(batch) for batch in batches] == self._shapes and (
            max(map(_documents, batches)) <= self._room
        )

    def fill(self, batches: Sequence[Batch | None]) -> None:
        """Copies another step's micro-batches into the memory."""
        for micro_batch, batch in zip(self.micro_batches, batches, strict=True):
            if batch is None:
                continue
            start = batch.get("document_start")
            if micro_batch.sequence is not None and start is not None:
                micro_batch.sequence.renew(start)
            for name in FIELDS:
                new, old = batch.get(name), getattr(micro_batch, name)
                if new is not None and old is not None:
                    old.copy_(new.reshape(old.shape), non_blocking=True)


def _shapes(batch: Batch | None) -> dict[str, Any] | None:
    if batch is None:
        return None
    return {name: None if field is None else field.shape for name, field in batch.items()}


def _documents(batch: Batch | None) -> int:
    """How many there may be in a micro-batch: each sequence begins one, marked or not."""
    start: Tensor | None = batch.get("document_start") if batch is not None else None
    return 0 if start is None else int(start[:, 1:].sum()) + len(start)


def _room(documents: int) -> int:
    """Half as many again, rounded up to a power of two, as attention kernels round."""
    return max(_LEAST_ROOM, 1 << (documents * 3 // 2 - 1).bit_length())


class GraphedSchedule:
    """A :class:`~samba_megatron.training.schedule.Schedule` that is recorded, then replayed.

    Args:
        record: how; a CUDA graph unless said otherwise.
    """

    def __init__(self, record: Recorder = record_cuda_graph) -> None:
        self._record = record
        self._inputs: StaticInputs | None = None
        self._steps = 0
        self._replay: Callable[[], Any] | None = None
        self._reports: Reports = []
        self._finalize: Callable[[], None] | None = None

    def forget(self) -> None:
        """The next steps are computed from Python and recorded anew: memory may have moved."""
        self._replay = self._finalize = self._inputs = None
        self._reports = []
        self._steps = 0

    def __call__(
        self,
        chunks: "Sequence[nn.Module]",
        iterators: Sequence[Iterator[Batch | MicroBatch | None]],
        num_microbatches: int,
        sequence_length: int,
        micro_batch_size: int,
    ) -> Reports:
        """As :func:`~samba_megatron.training.schedule.run_schedule`, of one model chunk."""
        (iterator,) = iterators
        batches: list[Any] = [next(iterator) for _ in range(num_microbatches)]
        end_to_end = lies_end_to_end(chunks, micro_batch_size)
        if self._inputs is None or not self._inputs.fits(batches):
            self.forget()
            self._inputs = StaticInputs(batches, end_to_end)
        else:
            self._inputs.fill(batches)
        micro_batches = self._inputs.micro_batches

        def run() -> Reports:
            again: list[Iterator[Any]] = [iter(micro_batches)]
            sizes = (num_microbatches, sequence_length, micro_batch_size)
            return run_schedule(chunks, again, *sizes)

        if self._steps < _WARM_UP:
            self._steps += 1
            return run()
        config = get_model_config(chunks[0])
        if self._replay is None:
            self._reports = self._recorded(config, run)
        return self._replayed(config)

    def _recorded(self, config: Any, run: Callable[[], Reports]) -> Reports:
        """Records forward and backward; the reduction of gradients that the schedule ends with is
        put off, and nothing is timed inside."""
        finalize, timers = config.finalize_model_grads_func, config.timers

        def put_off(*arguments: Any, **named: Any) -> None:
            self._finalize = lambda: finalize(*arguments, **named)

        config.finalize_model_grads_func, config.timers = put_off, None
        try:
            reports, self._replay = self._record(run)
        finally:
            config.finalize_model_grads_func, config.timers = finalize, timers
        return reports

    def _replayed(self, config: Any) -> Reports:
        assert self._replay is not None
        timers = config.timers
        if timers is not None:
            timers("graph").start()
        self._replay()
        if timers is not None:
            timers("graph").stop()
        assert self._finalize is not None
        self._finalize()
        return self._reports
