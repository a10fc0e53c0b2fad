"""What a run will read of each source, in words, before the first step."""

from collections.abc import Sequence

from samba_megatron.data.blend_order import Plan, Position, phase_shares, project
from samba_megatron.data.sample_index import SourcePart
from samba_megatron.tracking.numbers import format_count

_MOST_SHOWN = 12

Rows = list[tuple[str, str]]


def summarise(
    parts: Sequence[SourcePart], plan: Plan, start: Position, length: int, sequence_length: int
) -> Rows:
    """A row for each source, the largest first, and one for each change of the blend to come.

    Args:
        parts: the sources.
        plan: shares, stages and caps.
        start: where the run goes on.
        length: samples of the whole run.
        sequence_length: tokens of a sample.
    """
    projected = project(plan, start, length)
    shares = phase_shares(plan, Position(start.samples, start.counts, start.samples, start.counts))
    whole = sum(shares) or 1
    order = sorted(range(len(parts)), key=lambda number: -projected.counts[number])
    rows = []
    for number in order[:_MOST_SHOWN]:
        end = float(projected.counts[number])
        text = f"{100 * shares[number] / whole:.2f}%"
        if start.samples:
            text += f", {format_count(int(start.counts[number]) * sequence_length)} tokens done"
        epochs = end / parts[number].samples_per_epoch(sequence_length)
        text += f", {format_count(end * sequence_length)} at the end: {epochs:.3g} epochs"
        rows.append((parts[number].name, text))
    if len(parts) > _MOST_SHOWN:
        rest = float(sum(projected.counts[number] for number in order[_MOST_SHOWN:]))
        name = f"{len(parts) - _MOST_SHOWN} others"
        rows.append((name, f"{format_count(rest * sequence_length)} tokens at the end"))
    changes = [
        (stage.end, "the next stage of the blend begins")
        for stage in plan.stages
        if stage.end is not None and start.samples < stage.end < length
    ]
    changes += [
        (sample, f"{parts[number].name} reaches max_epochs and its share goes to the others")
        for number, sample in projected.used_up.items()
        if sample < length
    ]
    changes.sort()
    rows += [
        (f"at {format_count(sample * sequence_length)} tokens", text)
        for sample, text in changes[:_MOST_SHOWN]
    ]
    if len(changes) > _MOST_SHOWN:
        rows.append(("later", f"{len(changes) - _MOST_SHOWN} more sources reach max_epochs"))
    return rows + _padding(parts, sequence_length)


def _padding(parts: Sequence[SourcePart], sequence_length: int) -> list[tuple[str, str]]:
    """What packing by best fit leaves empty, over one pass of every source."""
    packed = [part.packed for part in parts if part.packed is not None]
    room = sum(size.samples for size in packed) * sequence_length
    filled = sum(size.positions for size in packed)
    return [("padding", f"{100 * (1 - filled / room):.3g}%")] if packed else []
