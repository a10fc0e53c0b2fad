"""Output folders that look finished only when they are."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from samba_megatron.platform.errors import UserError
from samba_megatron.platform.files import sync

UNFINISHED = ".partial"
EARLIER = ".replaced"


def require_new(output: Path, replaces: str | None = None) -> None:
    """Makes sure that ``output`` can be made.

    Args:
        output: the folder.
        replaces: a file by which a folder that may be replaced is known; None: none may be.

    Raises:
        UserError: it holds something, or an earlier attempt has left something.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if replaces is None:
            raise UserError(
                f"the output {output} is not an empty folder: choose another or empty it"
            )
        if not (output / replaces).is_file():
            raise UserError(
                f"the output {output} has no {replaces}, so it is no earlier one to overwrite: "
                "choose another or empty it"
            )
    unfinished = unfinished_name(output)
    if unfinished.exists() and replaces is None:
        raise UserError(
            f"{unfinished} was left by a conversion that did not finish: look at it, then delete it"
        )


def unfinished_name(output: Path) -> Path:
    """The name under which ``output`` is made."""
    return output.with_name(output.name + UNFINISHED)


@contextmanager
def finished_at_end(output: Path, replaces: str | None = None) -> Iterator[Path]:
    """A new folder to write into, which becomes ``output`` if the block succeeds; else it stays
    under its unfinished name, to be looked at. An earlier ``output`` stays until then.

    Raises:
        UserError: as :func:`require_new`, or the folder cannot be made.
    """
    output = output.absolute()
    require_new(output, replaces)
    unfinished = unfinished_name(output)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"the output {output} cannot be made ({error.strerror}): choose another"
        ) from None
    yield unfinished
    sync(unfinished)
    earlier = output.with_name(output.name + EARLIER)
    if replaces is not None and output.exists():
        os.replace(output, earlier)
    os.replace(unfinished, output)
    sync(output.parent)
    shutil.rmtree(earlier, ignore_errors=True)
