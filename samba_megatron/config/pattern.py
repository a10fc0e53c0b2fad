"""The layer pattern: ``M-*- x6`` says which layers a model has, in order.

Megatron-core's alphabet for hybrid models, with repeats so that a recipe stays readable, and one
symbol more: ``F``, attention without a window, which megatron writes ``*`` like any attention.
Pipeline cuts are written ``|`` as there; where a pattern has none they are placed here.

Standard library only: the planner and the configuration checks read patterns without torch.
"""

import re
from functools import cache

from samba_megatron.platform.errors import UserError

MAMBA = "M"
ATTENTION = "*"
FULL_ATTENTION = "F"
MLP = "-"
CUT = "|"

LAYER_NAMES = {
    MAMBA: "Mamba",
    ATTENTION: "windowed attention",
    FULL_ATTENTION: "full attention",
    MLP: "MLP",
}
"""Layer symbols and what they stand for."""

_REPEAT = re.compile(r"x(\d+)")
_ALPHABET = (
    "M (Mamba), * (attention in the window), F (attention without a window), - (MLP), "
    "| (pipeline cut) and, after a space, xN (repeat the group before)"
)


def expand_pattern(pattern: str) -> str:
    """Writes the repeats out: ``"M-*- x2"`` becomes ``"M-*-M-*-"``; cuts stay.

    Raises:
        UserError: unknown symbol, a repeat of nothing, no layers, or a stage without layers.
    """
    groups: list[str] = []
    repeatable = False
    for word in pattern.split():
        repeat = _REPEAT.fullmatch(word)
        if repeat is None:
            _check_symbols(word, pattern)
            groups.append(word)
        elif not repeatable or int(repeat[1]) < 1:
            raise UserError(
                f"model.hybrid_layer_pattern {pattern!r}: {word} must follow a group of layers and "
                "repeat it at least once, as in 'M-*- x6'"
            )
        else:
            groups[-1] *= int(repeat[1])
        repeatable = repeat is None
    expanded = "".join(groups)
    if not expanded:
        raise UserError("model.hybrid_layer_pattern is empty: write layers, as in 'M-*- x6'")
    if not all(expanded.split(CUT)):
        raise UserError(
            f"model.hybrid_layer_pattern {pattern!r} has a pipeline stage without layers: put "
            "every | between two layers"
        )
    return expanded


def _check_symbols(word: str, pattern: str) -> None:
    for symbol in word:
        if symbol not in LAYER_NAMES and symbol != CUT:
            raise UserError(
                f"model.hybrid_layer_pattern {pattern!r} has the unknown symbol {symbol!r}: "
                f"allowed are {_ALPHABET}"
            )


def layer_symbols(pattern: str) -> str:
    """The layers in order, repeats written out, without pipeline cuts."""
    return expand_pattern(pattern).replace(CUT, "")


def split_stages(
    pattern: str, pipeline_size: int = 1, virtual_size: int | None = None
) -> list[str]:
    """The model chunks in the order of their layers: ``pipeline_size * virtual_size`` of them.

    Chunk ``i`` is chunk ``i // pipeline_size`` of pipeline rank ``i % pipeline_size``. Cuts of the
    pattern are kept; a pattern without cuts is cut on block boundaries (after an MLP; between any
    layers in a pattern without MLPs) so that the chunks are as equal in layers as can be, the
    last and the first the lighter ones, since they also hold the head and the embedding.

    Raises:
        UserError: the pattern's cuts do not make that many chunks, or it has too few blocks.
    """
    chunks = pipeline_size * (virtual_size or 1)
    expanded = expand_pattern(pattern)
    wanted = f"parallel.pipeline_model_parallel_size {pipeline_size}"
    if virtual_size is not None:
        wanted += f" × parallel.virtual_pipeline_model_parallel_size {virtual_size}"
    if CUT in expanded:
        stages = expanded.split(CUT)
        if len(stages) != chunks:
            raise UserError(
                f"{wanted} needs {chunks} model chunks, and the cuts of "
                f"model.hybrid_layer_pattern {pattern!r} make {len(stages)}: change one of them, "
                "or leave the cuts out to have them placed"
            )
        return stages
    blocks = _blocks(expanded)
    if len(blocks) < chunks:
        raise UserError(
            f"{wanted} needs {chunks} model chunks, and model.hybrid_layer_pattern {pattern!r} has "
            f"{len(blocks)} blocks: use at most {len(blocks)} chunks, or cut inside blocks by hand "
            "with |"
        )
    return list(_balanced(tuple(blocks), chunks))


def _blocks(expanded: str) -> list[str]:
    """The smallest pieces that automatic cuts keep whole: a mixer (or several) and its MLP."""
    if MLP not in expanded:
        return list(expanded)
    return re.findall(rf"[^{MLP}]*{MLP}|[^{MLP}]+$", expanded)


@cache
def _balanced(blocks: tuple[str, ...], chunks: int) -> tuple[str, ...]:
    """Consecutive blocks joined into ``chunks`` chunks with the least sum of squared lengths.

    Among equals the one with the lightest last, then the lightest first chunk.
    """

    @cache
    def best(start: int, left: int) -> tuple[tuple[int, int, int], tuple[str, ...]]:
        candidates = []
        for end in _ends(start, left):
            chunk = "".join(blocks[start:end])
            cost, rest = best(end, left - 1) if left > 1 else ((0, len(chunk), 0), ())
            first = len(chunk) if start == 0 else 0
            candidates.append(((cost[0] + len(chunk) ** 2, cost[1], first), (chunk, *rest)))
        return min(candidates)

    def _ends(start: int, left: int) -> range:
        if left == 1:
            return range(len(blocks), len(blocks) + 1)
        return range(start + 1, len(blocks) - left + 2)

    return best(0, chunks)[1]


def to_megatron(
    pattern: str, pipeline_size: int = 1, virtual_size: int | None = None
) -> tuple[str, tuple[int, ...]]:
    """The pattern as megatron-core reads it, and what it cannot say.

    Returns:
        The pattern with pipeline cuts and ``*`` for all attention; and the layer numbers (over
        the whole model, from 1, as megatron counts) of the attention layers without a window.
    """
    stages = split_stages(pattern, pipeline_size, virtual_size)
    layers = "".join(stages)
    full = tuple(number for number, symbol in enumerate(layers, 1) if symbol == FULL_ATTENTION)
    return CUT.join(stages).replace(FULL_ATTENTION, ATTENTION), full


def describe_layers(
    pattern: str, pipeline_size: int = 1, virtual_size: int | None = None
) -> list[str]:
    """The layer map for people, a line for each model chunk.

    For example ``stage 0: layers 1-4 M-*- (1 Mamba, 1 windowed attention, 2 MLP)``.
    """
    lines = []
    number = 1
    for index, chunk in enumerate(split_stages(pattern, pipeline_size, virtual_size)):
        place = f"stage {index % pipeline_size}"
        if virtual_size is not None:
            place += f" chunk {index // pipeline_size}"
        counts = ", ".join(
            f"{chunk.count(symbol)} {name}"
            for symbol, name in LAYER_NAMES.items()
            if symbol in chunk
        )
        lines.append(f"{place}: layers {number}-{number + len(chunk) - 1} {chunk} ({counts})")
        number += len(chunk)
    return lines
