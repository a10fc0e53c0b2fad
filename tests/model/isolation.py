"""One trial that document A cannot touch document B, on whatever layout and kernels.

The same packed batch is run twice, with one token of one document changed. Outside that document
every output of every pipeline stage, every loss and every gradient of the embedded tokens must keep
its bits; and where the loss counts the other documents only, so must every parameter's gradient.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from samba_megatron.config import KernelsConfig, ModelConfig, ParallelConfig, RunConfig
from samba_megatron.data.stream import Batch
from samba_megatron.model.backend import Implementation
from samba_megatron.model.samba import build_model
from samba_megatron.platform import distributed
from samba_megatron.training.schedule import own_piece, run_schedule

LENGTH, SEQUENCES, MICRO_BATCHES, VOCABULARY = 160, 2, 2, 64
EDGES = [1, 2, 15, 16, 17, 79, 80, 81, 127, 128, 129, 159]
"""First and last positions; chunks of the scan, shards of two and four, blocks of attention."""
KERNELS = ("selective_scan", "causal_conv1d", "windowed_attention")
TORCH: dict[str, Any] = dict.fromkeys(KERNELS, "torch")
REFERENCE: dict[str, Any] = dict.fromkeys(KERNELS, "reference")


@dataclass(frozen=True)
class Packing:
    """Documents of a step's sequences, and the token that is changed."""

    starts: tuple[tuple[int, ...], ...]
    """Of each sequence, where documents after the first start."""
    sequence: int
    position: int

    def document_start(self) -> Tensor:
        """Bool [sequences, s]."""
        start = torch.zeros(len(self.starts), LENGTH, dtype=torch.bool)
        start[:, 0] = True
        for row, positions in zip(start, self.starts, strict=True):
            row[list(positions)] = True
        return start

    def others(self) -> Tensor:
        """Bool [sequences, s]: the tokens outside the changed document."""
        numbers = self.document_start().cumsum(1)
        others = torch.ones_like(numbers, dtype=torch.bool)
        own = numbers[self.sequence] == numbers[self.sequence, self.position]
        others[self.sequence] = ~own
        return others


def packings() -> st.SearchStrategy[Packing]:
    """Any documents, with a liking for edges; a document may be longer than its sequence."""
    count = SEQUENCES * MICRO_BATCHES
    position = st.sampled_from(EDGES) | st.integers(1, LENGTH - 1)
    starts = st.lists(position, max_size=5, unique=True).map(tuple)
    return st.builds(
        Packing,
        st.tuples(*[starts] * count),
        st.integers(0, count - 1),
        st.sampled_from([0, *EDGES]) | st.integers(0, LENGTH - 1),
    )


@dataclass
class Trace:
    """What a step computed on this rank, as far as it has it."""

    outputs: list[Tensor] = field(default_factory=list)
    """Of each chunk and micro-batch, hidden states; of the last chunk also the losses."""
    gradients: dict[int, Tensor] = field(default_factory=dict)
    """Of the embedded tokens, by micro-batch."""
    parameters: dict[str, Tensor] = field(default_factory=dict)
    """Gradients by name."""


def toy_run(kernels: dict[str, Any], parallel: ParallelConfig, **model: Any) -> RunConfig:
    """A run over every kind of layer; a window shorter than the sequence."""
    sizes = {
        "hybrid_layer_pattern": "M-*- MMF-*-",
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": VOCABULARY,
        "window_size": 24,
        "short_convolution": True,
    }
    config = RunConfig(
        model=ModelConfig(**{**sizes, **model}), parallel=parallel, kernels=KernelsConfig(**kernels)
    )
    config.data.sequence_length = LENGTH
    return config


class Trial:
    """A model in the layout that is up, and steps of it.

    Args:
        config: the run.
        implementation: the layer backend.
        noise: of the largest value, for gradients of parameters that even the same step does not
            repeat to the bit: kernels that add up in any order.
    """

    def __init__(
        self, config: RunConfig, implementation: Implementation = "local", noise: float = 0.0
    ) -> None:
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        self.chunks = build_model(config, implementation)
        self.noise = noise
        generator = torch.Generator().manual_seed(3)
        count = (SEQUENCES * MICRO_BATCHES, LENGTH)
        self.tokens, self.labels = (
            torch.randint(0, VOCABULARY, count, generator=generator) for _ in range(2)
        )

    def leaks(self, packing: Packing, apart: bool = True) -> list[str]:
        """What changed outside the document whose token changed; the same on every rank.

        Args:
            packing: the documents.
            apart: keep them apart; without it the names of much should come back.
        """
        changed = self.tokens.clone()
        changed[packing.sequence, packing.position] += 1
        changed %= VOCABULARY
        others, everywhere = packing.others(), torch.ones(self.tokens.shape)
        start = packing.document_start()
        if not apart:  # every sequence is one document
            start[:, 1:] = False
        first, second = (self.step(t, everywhere, start) for t in (self.tokens, changed))
        found = self._differences(first, second, others)
        own = self._differences(first, second, ~others)
        assert distributed.any_rank(bool(own)), "the change had no effect at all"
        first, second = (self.step(t, others.float(), start) for t in (self.tokens, changed))
        again = self.step(self.tokens, others.float(), start) if self.noise else first
        for name, gradient in first.parameters.items():
            repeats = torch.equal(gradient, again.parameters[name])
            allowed = 0.0 if repeats else self.noise * float(gradient.abs().max())
            if float((gradient - second.parameters[name]).abs().max()) > allowed:
                found.append(f"gradient of {name}")
        return sorted(set(distributed.gather_text(", ".join(found))) - {""})

    def _differences(self, first: Trace, second: Trace, where: Tensor) -> list[str]:
        by_micro_batch = where.split(SEQUENCES)
        found = []
        for number, (one, two) in enumerate(zip(first.outputs, second.outputs, strict=True)):
            own = self._own(by_micro_batch[number % MICRO_BATCHES], one)
            if not torch.equal(one[own], two[own]):
                found.append("outputs")
        for number, one in first.gradients.items():
            own = self._own(by_micro_batch[number], one)
            if not torch.equal(one[own], second.gradients[number][own]):
                found.append("gradients of the tokens")
        return found

    def _own(self, where: Tensor, like: Tensor) -> Tensor:
        """[b, s] bool as [s, b], or as the one row [b·s, 1], for what this rank holds of it."""
        columns = where.reshape(-1, 1) if like.shape[1] == 1 else where.t()
        piece = len(columns) // parallel_state.get_context_parallel_world_size()
        part, first = like.shape[0], parallel_state.get_context_parallel_rank() * piece
        if part < piece:  # sequence parallelism divides it further
            first += parallel_state.get_tensor_model_parallel_rank() * part
        return columns[first : first + part].to(like.device)

    def step(self, tokens: Tensor, loss_mask: Tensor, start: Tensor | None) -> Trace:
        for chunk in self.chunks:
            chunk.zero_grad()
        batches = list(_batches(tokens, self.labels, loss_mask, start))
        with _recorded(self.chunks) as trace:
            run_schedule(
                self.chunks,
                [iter(batches) for _ in self.chunks],
                MICRO_BATCHES,
                LENGTH,
                SEQUENCES,
                forward_only=False,
            )
        trace.parameters = {
            f"{number}.{name}": parameter.grad.clone()
            for number, chunk in enumerate(self.chunks)
            for name, parameter in chunk.named_parameters()
            if parameter.grad is not None
        }
        assert trace.parameters
        return trace


def _batches(
    tokens: Tensor, labels: Tensor, loss_mask: Tensor, start: Tensor | None
) -> Iterator[Batch | None]:
    """What this stage reads of each micro-batch."""
    ends = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    ends = ends or parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    for part in range(0, len(tokens), SEQUENCES):
        rows = slice(part, part + SEQUENCES)
        batch: Batch = {} if start is None else {"document_start": start[rows]}
        if ends:
            batch |= {
                "tokens": tokens[rows],
                "labels": labels[rows],
                "loss_mask": loss_mask[rows],
                "position_ids": torch.arange(LENGTH).expand(SEQUENCES, -1),
            }
        yield own_piece().cut(batch) or None


@contextmanager
def _recorded(chunks: Sequence[Any]) -> Iterator[Trace]:
    """Hooks that keep what the chunks compute inside."""
    trace, by_chunk, handles = Trace(), [list[Tensor]() for _ in chunks], []

    def keep(outputs: list[Tensor], tensor: Tensor) -> None:
        outputs.append(tensor.detach().clone())

    def keep_gradient(number: int, gradient: Tensor) -> None:
        trace.gradients[number] = gradient.clone()

    losses: list[Tensor] = []
    embedded: list[int] = []

    def on_embedding(module: Any, given: Any, output: Tensor) -> None:
        number = len(embedded)
        embedded.append(number)
        output.register_hook(lambda gradient: keep_gradient(number, gradient))

    for chunk, outputs in zip(chunks, by_chunk, strict=True):
        hook = chunk.decoder.register_forward_hook
        handles.append(hook(lambda m, given, out, kept=outputs: keep(kept, out)))
        if chunk.pre_process:
            handles.append(chunk.embedding.register_forward_hook(on_embedding))
        if chunk.post_process:
            handles.append(chunk.register_forward_hook(lambda m, g, out: keep(losses, out.t())))
    yield trace
    for handle in handles:
        handle.remove()
    trace.outputs = [output for outputs in (*by_chunk, losses) for output in outputs]
