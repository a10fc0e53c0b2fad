"""What test_trust runs in a process of its own: a checkpoint of another run, a return, a resume.

Prints what Transformer Engine would have been told at each reading.
"""

import os
import sys
from pathlib import Path

from samba_megatron.checkpoint.store import CheckpointStore
from tests.checkpoint.tiny_run import TinyRun, start, store_in, tiny_config

TRUST = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def main(folder: Path) -> None:
    read, seen = CheckpointStore._read, []

    def noting(*arguments: object) -> object:
        seen.append(os.environ.pop(TRUST, "nothing"))
        return read(*arguments)  # type: ignore[arg-type]

    CheckpointStore._read = noting  # type: ignore[assignment,method-assign]
    start(tiny_config())
    run, own = TinyRun(tiny_config()), store_in(folder / "own")
    run.train(1)
    own.save(run.state, blocking=True)
    run.train(2)
    run.load(store_in(folder / "new", load=str(folder / "own")))
    assert own.go_back(run.state, 1) is not None
    run.load(own)
    print(f"told: {', '.join(seen)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
