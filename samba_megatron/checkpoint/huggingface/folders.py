"""Output folders that look finished only when they are."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from samba_megatron.checkpoint.manifest import sync
from samba_megatron.platform.errors import UserError

UNFINISHED = ".partial"


def require_new(output: Path) -> None:
    """Makes sure that ``output`` can be made.

    Raises:
        UserError: it holds something, or an earlier attempt has left something.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"the output {output} is not an empty folder: choose another or empty it")
    unfinished = unfinished_name(output)
    if unfinished.exists():
        raise UserError(
            f"{unfinished} was left by a conversion that did not finish: look at it, then delete it"
        )


def unfinished_name(output: Path) -> Path:
    """The name under which ``output`` is made."""
    return output.with_name(output.name + UNFINISHED)


@contextmanager
def finished_at_end(output: Path) -> Iterator[Path]:
    """A new folder to write into, which becomes ``output`` if the block succeeds; else it stays
    under its unfinished name, to be looked at.

    Raises:
        UserError: as :func:`require_new`, or the folder cannot be made.
    """
    output = output.absolute()
    require_new(output)
    unfinished = unfinished_name(output)
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"the output {output} cannot be made ({error.strerror}): choose another"
        ) from None
    yield unfinished
    sync(unfinished)
    os.replace(unfinished, output)
    sync(output.parent)
