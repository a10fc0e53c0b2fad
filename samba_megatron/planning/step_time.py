"""How long a step takes: the layers' operations and bytes over the rates that a GPU reaches.

Matrix products, attention and the fused scan by their operations, everything element-wise by the
bytes that it moves, which go with what a layer keeps for its backward pass. Rates are shares of a
GPU's peaks, measured (``platform/hardware.yaml``); ``docs/planning.md`` has the errors.
"""

import math
from dataclasses import dataclass

from samba_megatron.model.layers import KINDS
from samba_megatron.ops.cost import conv_flops, scan_flops
from samba_megatron.planning.communication import (
    Transfer,
    context_layer,
    data_transfer,
    embedding_seconds,
    link_of,
    pipeline_transfer,
    tensor_layer,
)
from samba_megatron.planning.layout import Layout
from samba_megatron.planning.memory import recomputes
from samba_megatron.platform.hardware import Gpu

_SCAN_CHANNELS, _SCAN_STEPS = 128, 32
"""Channels of a block of the fused scan, and steps of a chunk."""
_SPLIT_BELOW, _SPLIT_COST, _SPLIT_SECONDS = 0.7, 1.39, 0.54e-3
"""Below that share of the blocks that the GPU holds time is cut up, and run through once more."""
_SCAN_FORWARD = 0.25
"""Of the scan's time."""
_NARROW = 0.5
"""Share of the usual rate that the mixer's two narrow products reach."""
_LOSS_BYTES = 14
"""Moved for each logit, both directions, in the cross-entropy."""
_ACCUMULATE_BYTES = 6
"""Moved for each parameter and micro-batch to add its gradient in fp32, as measured: part of it
hides."""
_CAST_BYTES = 4.4
"""Moved for each number that a layer keeps to have it in FP8, as it is and transposed."""
_UPDATE_BYTES, _WHOLE_BYTES = 60, 16
"""Moved in a step for each parameter whose state a rank holds, and for each that it has."""


@dataclass(frozen=True)
class Pass:
    """Seconds of a micro-batch through some layers, forward and backward."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: "Pass") -> "Pass":
        return Pass(self.forward + other.forward, self.backward + other.backward)

    @property
    def both(self) -> float:
        """Their sum."""
        return self.forward + self.backward


@dataclass(frozen=True)
class StepTime:
    """Where a step's time goes, seconds, on the slowest pipeline stage."""

    forward: float
    """All micro-batches, tensor- and context-parallel communication included."""
    backward: float
    """With recomputation."""
    bubble: float
    pipeline_messages: float
    gradient_reduce: float
    """Not hidden, with the gather of parameters."""
    optimizer: float
    """And what else a step has beside its layers."""
    transfers: list[Transfer]

    @property
    def total(self) -> float:
        """The step."""
        return (
            self.forward
            + self.backward
            + self.bubble
            + self.pipeline_messages
            + self.gradient_reduce
            + self.optimizer
        )

    @property
    def bubble_share(self) -> float:
        """Of the step."""
        return self.bubble / self.total


class StepModel:
    """The time of a layout's step on a kind of GPU."""

    def __init__(self, layout: Layout, gpu: Gpu) -> None:
        self._layout, self._gpu = layout, gpu
        self._model = layout.config.model
        self._achieved = gpu.achieved
        self._fp8 = bool(layout.config.precision.fp8) and "fp8" in gpu.tflops
        self._passes: dict[tuple[str, bool], Pass] = {}

    def step(self) -> StepTime:
        """Micro-batches on the slowest stage, the others' part of one micro-batch in the bubble,
        then what is not hidden of the communication, and the update."""
        layout, gpu = self._layout, self._gpu
        stages = [self._stage(stage) for stage in range(layout.pipeline)]
        slowest = max(stages, key=lambda stage: stage.both)
        number = layout.micro_batches
        bubble = (sum(stage.both for stage in stages) - slowest.both) / layout.virtual
        fullest = max(range(layout.pipeline), key=layout.parameters)
        data = data_transfer(layout, gpu, fullest, slowest.forward, slowest.backward)
        pipeline = pipeline_transfer(layout, gpu)
        return StepTime(
            forward=number * slowest.forward * (2 if layout.has_first_pass else 1),
            backward=number * slowest.backward,
            bubble=bubble,
            pipeline_messages=pipeline.exposed_seconds,
            gradient_reduce=data.exposed_seconds + embedding_seconds(layout, gpu),
            optimizer=self._update(layout.parameters(fullest)),
            transfers=[each for each in (*self._in_layers(), pipeline, data) if each.bytes],
        )

    def _stage(self, stage: int) -> Pass:
        parallel, total = self._layout.config.parallel, Pass()
        full = parallel.recompute_granularity == "full"
        first = parallel.recompute_num_layers if parallel.recompute_method == "block" else 1 << 30
        for chunk in self._layout.chunks(stage):
            for position, symbol in enumerate(chunk):
                key = (symbol, full and position < first)
                if key not in self._passes:
                    self._passes[key] = self._layer(*key)
                total += self._passes[key]
        return total + self._head() if stage == self._layout.pipeline - 1 else total

    def _layer(self, symbol: str, again: bool) -> Pass:
        """A layer's time; ``again``: computed twice."""
        parts = [self._products(symbol), self._elementwise(symbol)]
        if symbol == "M":
            parts.append(self._scan())
        own = sum(parts, Pass())
        backward = own.backward + (own.forward if again else self._again(symbol, own, parts))
        host = self._achieved.host_layer_ms / 1000
        # Kernels cannot run faster than they are launched.
        own = Pass(max(own.forward, host / 3), max(backward, host * 2 / 3))
        for exchange in (tensor_layer, context_layer):
            _, forward, back = exchange(self._layout, self._gpu, symbol)
            own += Pass(forward, back)
        return own

    def _again(self, symbol: str, own: Pass, parts: list[Pass]) -> float:
        """Seconds that selective recomputation adds to the backward pass."""
        seconds = self._parts_again(symbol)
        if not recomputes(self._layout.config.parallel, symbol):
            return seconds
        if symbol == "M":
            return seconds + parts[2].forward + parts[1].forward / 2
        return seconds + (own.forward if symbol == "-" else self._attention(symbol).forward)

    def _parts_again(self, symbol: str) -> float:
        """Seconds for the results within a layer that are computed again."""
        layout, seconds = self._layout, 0.0
        parts = KINDS[symbol].recomputable_parts(self._model)
        for name in layout.config.parallel.recomputed_parts:
            if name == "scan" and symbol == "M":
                seconds += self._scan().forward
            elif part := parts.get(name):
                split = layout.tensor if part.inner else layout.sequence_split
                moved = layout.tokens * part.moved * layout.element / split
                seconds += moved / self._bandwidth()
                if name == "dt_proj":
                    flops = layout.tokens * part.flops / split
                    seconds += flops / (_NARROW * self._rate(False))
        return seconds

    def _products(self, symbol: str) -> Pass:
        """Linears, the mixer's narrow products, attention."""
        kind, layout, model = KINDS[symbol], self._layout, self._model
        tokens = layout.tokens / layout.tensor
        linear = tokens * kind.linear_flops_per_token(model) / self._rate(self._fp8)
        own = Pass(linear, 2 * linear)
        if symbol in "*F":
            return own + self._attention(symbol)
        if symbol == "M":
            e = model.d_inner
            rest = kind.recomputed_flops_per_token(model, layout.config.data.sequence_length)
            narrow = rest - scan_flops(1, e, model.d_state) - conv_flops(1, e, model.d_conv)
            seconds = tokens * narrow / (_NARROW * self._rate(False))
            own += Pass(seconds, 2 * seconds)
        return own

    def _attention(self, symbol: str) -> Pass:
        layout, achieved = self._layout, self._achieved
        length = layout.config.data.sequence_length
        flops = KINDS[symbol].recomputed_flops_per_token(self._model, length)
        work = layout.tokens / layout.tensor * flops / (self._gpu.tflops["bf16"] * 1e12)
        apart = layout.config.data.reset_at_document_boundaries
        forward, backward = achieved.attention_of_documents if apart else achieved.attention
        return Pass(work / forward, 2 * work / backward)

    def _rate(self, fp8: bool) -> float:
        """FLOP/s of matrix products; narrow models and tensor-parallel parts reach less."""
        precision = "fp8" if fp8 else "bf16" if self._layout.element == 2 else "fp32"
        share = self._achieved.fp8 if fp8 else self._achieved.bf16
        width = self._model.hidden_size / math.sqrt(self._layout.tensor)
        share *= width / (width + self._achieved.half_width)
        return self._gpu.tflops[precision] * 1e12 * share

    def _bandwidth(self) -> float:
        return self._gpu.bandwidth * 1e12 * self._achieved.memory

    def _elementwise(self, symbol: str) -> Pass:
        """Norms, residuals, gates, the convolution, casts to FP8; gradients added in fp32."""
        layout, kind = self._layout, KINDS[symbol]
        saved = kind.saved_activations(self._model)
        split = layout.sequence_split
        numbers = (saved.stream + saved.stream_operands) / split
        numbers += (saved.inner + saved.inner_operands) / layout.tensor
        moved = self._achieved.passes * layout.element * numbers
        if self._fp8:
            moved += _CAST_BYTES * numbers
        seconds = layout.tokens * moved / self._bandwidth()
        parameters = kind.parameters(self._model) / layout.tensor
        accumulated = _ACCUMULATE_BYTES * parameters / self._bandwidth()
        return Pass(seconds / 3, seconds * 2 / 3 + accumulated)

    def _scan(self) -> Pass:
        """The fused scan: blocks of channels go through time together, as many as the GPU holds.

        Where there are too few of them time is cut up, and run through once more.
        """
        layout, model = self._layout, self._model
        sequences = layout.config.training.micro_batch_size
        held = 2 * self._gpu.multiprocessors
        rows = sequences * math.ceil(model.d_inner / layout.tensor / _SCAN_CHANNELS)
        chunks = math.ceil(layout.tokens / sequences / _SCAN_STEPS)
        is_split = rows < _SPLIT_BELOW * held
        pieces = max(1, min(math.ceil(held / rows), chunks // 4)) if is_split else 1
        jobs = rows * pieces
        steps = math.ceil(jobs * math.ceil(chunks / pieces) / min(held, jobs)) * _SCAN_STEPS
        seconds = steps * self._achieved.scan_step_us * 1e-6 * model.d_state / 16
        if pieces > 1:
            seconds = seconds * _SPLIT_COST + _SPLIT_SECONDS
        return Pass(seconds * _SCAN_FORWARD, seconds * (1 - _SCAN_FORWARD))

    def _head(self) -> Pass:
        """The product with the embedding, in bf16, and the loss."""
        layout, model = self._layout, self._model
        logits = layout.tokens * model.vocab_size / layout.tensor
        product = 2 * model.hidden_size * logits / self._rate(False)
        loss = _LOSS_BYTES * logits / self._bandwidth()
        return Pass(product + loss / 2, 2 * product + loss / 2)

    def _update(self, parameters: int) -> float:
        layout = self._layout
        moved = parameters * (_UPDATE_BYTES / layout.optimizer_ranks + _WHOLE_BYTES)
        return moved / self._bandwidth() + self._achieved.host_step_ms / 1000

    def _in_layers(self) -> list[Transfer]:
        """What tensor and context parallelism send in a step; the layers' times have it in them."""
        layout, gpu = self._layout, self._gpu
        spans = {"tensor": layout.tensor, "context": layout.tensor * layout.context}
        found = []
        symbols = set(layout.config.model.hybrid_layer_pattern) & set(KINDS)
        for (name, span), exchange in zip(
            spans.items(), (tensor_layer, context_layer), strict=True
        ):
            sent = {symbol: exchange(layout, gpu, symbol) for symbol in symbols}
            fullest = max(
                (
                    [sent[symbol] for chunk in layout.chunks(stage) for symbol in chunk]
                    for stage in range(layout.pipeline)
                ),
                key=lambda layers: sum(layer[0] for layer in layers),
            )
            number = layout.micro_batches
            seconds = number * sum(layer[1] + layer[2] for layer in fullest)
            size = number * sum(layer[0] for layer in fullest)
            found.append(Transfer(name, link_of(gpu, span)[0], size, seconds, seconds))
        return found
