"""Held-out loss inside the loop, at several context lengths."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from samba_megatron.config import RunConfig
from samba_megatron.data.held_out import held_out_blocks
from samba_megatron.data.stream import Batch, SampleDataset, evaluation_batches
from samba_megatron.training.schedule import mean_loss, needs_tokens, own_piece, run_schedule


@dataclass(frozen=True)
class Evaluation:
    """Loss at one context length."""

    sequence_length: int
    loss: float
    """Mean cross-entropy a token, nats."""
    tokens: int
    """Held-out tokens scored."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


class Evaluator:
    """Scores fixed blocks of held-out text; the same tokens every time.

    Args:
        config: the run's configuration. Lengths are ``validation.sequence_lengths``.
        split_dataset: validation samples of a ``data.split`` run, which are scored at the training
            length where there is no ``data.valid_data_path``.
    """

    def __init__(self, config: RunConfig, split_dataset: SampleDataset | None) -> None:
        self._config = config
        self._datasets: dict[int, SampleDataset] = {}
        validation, data = config.validation, config.data
        if not data.valid_data_path:
            if split_dataset is not None:
                self._datasets[data.sequence_length] = split_dataset
            return
        for length in validation.sequence_lengths or [data.sequence_length]:
            blocks = max(validation.eval_tokens // length, 1)
            self._datasets[length] = held_out_blocks(
                _prefixes(data.valid_data_path),
                length,
                blocks,
                data.reset_at_document_boundaries,
                data.loss_masks,
            )

    @property
    def has_data(self) -> bool:
        """Whether there is anything to score."""
        return bool(self._datasets)

    def evaluate(self, chunks: Sequence[Any]) -> list[Evaluation]:
        """Scores every length. Every rank calls it; the results are the same on all."""
        for chunk in chunks:
            chunk.eval()
        with torch.no_grad():
            results = [self._score(chunks, length) for length in self._datasets]
        for chunk in chunks:
            chunk.train()
        return results

    def _score(self, chunks: Sequence[Any], length: int) -> Evaluation:
        dataset = self._datasets[length]
        micro_batch_size, pieces = micro_batch_and_pieces(self._config, length)
        batches: list[Batch | None] = list(
            evaluation_batches(
                dataset,
                micro_batch_size,
                parallel_state.get_data_parallel_rank(),
                parallel_state.get_data_parallel_world_size(),
                own_piece(),
            )
        )
        batches += _fill_up(batches, self._config)
        if not needs_tokens():
            batches = [_boundaries(batch) for batch in batches]
        iterators = [iter(batches) for _ in chunks]
        reports = run_schedule(
            chunks,
            iterators,
            len(batches),
            length,
            micro_batch_size,
            forward_only=True,
            pieces=pieces,
        )
        return Evaluation(length, mean_loss(reports).item(), len(dataset) * length)


def micro_batch_and_pieces(config: RunConfig, length: int) -> tuple[int, int]:
    """How sequences of a length are scored in the memory of a training step.

    Returns:
        Sequences of a micro-batch, as many as hold the tokens of a training micro-batch (of a piece
        of one), at least one; and the pieces of each, none shorter than in training.
    """
    piece = config.data.sequence_length // config.parallel.sequence_pieces
    pieces = max(length // piece, 1) if config.parallel.sequence_pieces > 1 else 1
    together = config.training.micro_batch_size * piece // (length // pieces)
    return max(together, 1), pieces


def _fill_up(batches: list[Batch | None], config: RunConfig) -> list[Batch | None]:
    """Batches that count nothing: the interleaved schedule wants a multiple of the stages."""
    if config.parallel.virtual_pipeline_model_parallel_size is None:
        return []
    last = batches[-1]
    assert last is not None and last["loss_mask"] is not None
    nothing: Batch = {**last, "loss_mask": torch.zeros_like(last["loss_mask"])}
    return [nothing] * (-len(batches) % config.parallel.pipeline_model_parallel_size)


def _boundaries(batch: Batch | None) -> Batch | None:
    """What a stage between the first and the last needs of a batch: where documents begin."""
    start = batch.get("document_start") if batch is not None else None
    return None if start is None else {"document_start": start}


def _prefixes(paths: Sequence[str]) -> list[str]:
    from samba_megatron.data.blend import validation_blend

    return validation_blend(paths).prefixes
