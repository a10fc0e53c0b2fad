"""Whether a configuration can run on this machine, decided before anything heavy is imported.

Single numbers come first, because the other rules divide by them; then all rules across groups,
so that one start reports everything that is wrong.
"""

from typing import Literal

from samba_megatron.config.rules import batch, graphs, layout, model, numbers, precision, run
from samba_megatron.config.rules.situation import Rule, Situation
from samba_megatron.config.run import RunConfig
from samba_megatron.platform.errors import UserError

BASIC_RULES: tuple[Rule, ...] = (numbers.bounds, numbers.pattern)
"""What the other rules rely on."""

RULES: tuple[Rule, ...] = (
    *model.RULES,
    *layout.RULES,
    *batch.RULES,
    *precision.RULES,
    *graphs.RULES,
    *run.RULES,
)
"""The rules across fields, in the order in which they are reported."""


def check_config(
    config: RunConfig,
    world_size: int,
    device_type: Literal["cuda", "cpu"],
    available_devices: int | None = None,
    local_world_size: int | None = None,
) -> None:
    """Refuses a configuration that cannot run, naming every field, value and remedy.

    Args:
        config: the run.
        world_size: processes of the run, over all hosts.
        device_type: what each process computes on.
        available_devices: GPUs of this machine; None if it is not known.
        local_world_size: processes on this machine; None if it is not known.

    Raises:
        UserError: one sentence for each violation.
    """
    found = violations(config, world_size, device_type, available_devices, local_world_size)
    if len(found) == 1:
        raise UserError(found[0])
    if found:
        lines = "".join(f"\n  - {sentence}" for sentence in found)
        raise UserError(f"{len(found)} settings cannot be used:{lines}")


def violations(
    config: RunConfig,
    world_size: int,
    device_type: Literal["cuda", "cpu"],
    available_devices: int | None = None,
    local_world_size: int | None = None,
) -> list[str]:
    """The sentences of :func:`check_config`; empty if the configuration can run."""
    situation = Situation(config, world_size, device_type, available_devices, local_world_size)
    basic = [sentence for rule in BASIC_RULES for sentence in rule(situation)]
    return basic or [sentence for rule in RULES for sentence in rule(situation)]
