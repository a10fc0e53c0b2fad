"""Which checkpoint a run starts from: the latest that is whole, down to the bytes of its tensors.

Sizes and the hashes of the indices are compared on rank 0. The contents, terabytes perhaps, are
read in parts by all ranks, once for each checkpoint. Where the latest is damaged the one before it
is taken; where none is whole a person must look.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from samba_megatron.checkpoint import folder, ranks
from samba_megatron.checkpoint.folder import Found, NoGoodCheckpoint
from samba_megatron.checkpoint.manifest import Manifest, damage
from samba_megatron.checkpoint.state import Progress
from samba_megatron.config import CheckpointConfig
from samba_megatron.platform import distributed
from samba_megatron.platform.errors import ExitWith
from samba_megatron.platform.exits import ExitCode
from samba_megatron.tracking.ledger import Cause


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint to start from, as far as it is known before a model is built."""

    path: Path
    manifest: Manifest
    corrupt: list[str] = field(default_factory=list)
    """What is wrong with newer ones."""

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration that it was saved with."""
        return self.manifest.config

    @property
    def progress(self) -> Progress:
        """How far the run had come."""
        return Progress(
            step=self.manifest.step,
            consumed_samples=self.manifest.consumed_samples,
            consumed_tokens=self.manifest.consumed_tokens,
            data_identity=self.manifest.data_identity,
            data_consumed=self.manifest.data_consumed,
            config=self.manifest.config,
        )


class Finder:
    """Finds checkpoints and remembers which are whole. Every rank calls every method.

    Args:
        config: with ``save`` and ``load`` resolved to paths or None.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        self._config = config
        self._own = Path(config.save) if config.save else None
        self._check = config.verify_on_load
        self._whole: set[Path] = set()
        self._damaged: dict[Path, str] = {}

    def to_start_from(self) -> Found | None:
        """The latest of ``config.save`` or, if that has none, what ``config.load`` names.

        Raises:
            ExitWith: code HOLD, if ``config.save`` has checkpoints and none that may be taken.
            UserError: if ``config.load`` names none or a damaged one.
        """
        own, load = self._own, self._config.load

        def find() -> Found | None:
            try:
                found = folder.find_latest(own, self._check, self._damaged) if own else None
            except NoGoodCheckpoint as error:
                raise ExitWith(ExitCode.HOLD, str(error), Cause.CHECKPOINT) from None
            if found is not None and found.corrupt and not self._config.fall_back:
                raise ExitWith(ExitCode.HOLD, _no_fall_back(found), Cause.CHECKPOINT)
            if found is None and load:
                found = folder.find_named(Path(load), self._check, self._damaged)
            return found

        while True:
            candidate = ranks.on_rank_0(find)
            if candidate is None or self._is_whole(candidate):
                return candidate

    def before(self, last_step: int) -> Found | None:
        """The newest whole checkpoint of ``config.save`` that is of ``last_step`` or before."""
        own = self._own
        if own is None:
            return None
        while True:
            candidate = ranks.on_rank_0(
                lambda: folder.find_before(own, last_step, self._check, self._damaged)
            )
            if candidate is None or self._is_whole(candidate):
                return candidate

    def _is_whole(self, candidate: Found) -> bool:
        """Whether the contents are what was written; each rank reads a part."""
        path = candidate.path
        if not self._check or path in self._whole:
            return True
        mine = sorted(candidate.manifest.checksums)[
            ranks.rank() :: torch.distributed.get_world_size()
        ]
        reasons = distributed.gather_text(damage(path, candidate.manifest, mine) or "")
        reason = next(filter(None, reasons), None)
        if reason is None:
            self._whole.add(path)
        else:
            self._damaged[path] = reason
        return reason is None

    def forget(self, path: Path) -> None:
        """A checkpoint was published anew."""
        self._whole.discard(path)
        self._damaged.pop(path, None)


def _no_fall_back(found: Found) -> str:
    return (
        f"{'; '.join(found.corrupt)}; checkpoint.fall_back is false: restore it, or write the name "
        f"of {found.path} into {found.path.parent / folder.LATEST}"
    )
