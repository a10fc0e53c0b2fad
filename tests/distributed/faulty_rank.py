"""The entry point of training with a fault in one rank, when it asks for the data of a step.

faulty_rank.py RANK STEP hang|raise --group.field VALUE …
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from samba_megatron.platform.errors import run_command


def break_data(step: int, fault: str, run_dir: Path) -> None:
    """From here on the stream of samples fails at ``step``; a file ``hangs`` says when it hangs."""
    from samba_megatron.data.stream import SampleStream

    healthy, steps = SampleStream.next_global_batch, [0]

    def faulty(self: SampleStream, size: int) -> Any:
        steps[0] += 1
        if steps[0] == step and fault == "hang":
            (run_dir / "hangs").write_text("now")
            time.sleep(10_000)
        if steps[0] == step:
            raise ValueError("this rank's data are broken")
        return healthy(self, size)

    SampleStream.next_global_batch = faulty  # type: ignore


def main() -> int:
    """As ``pretrain_samba.py``."""
    from samba_megatron.config.load import parse_run_config

    rank, step, fault = sys.argv[1:4]
    config = parse_run_config(sys.argv[4:])
    assert config.run_dir is not None
    if os.environ["RANK"] == rank:
        break_data(int(step), fault, Path(config.run_dir))

    from samba_megatron.platform import distributed
    from samba_megatron.training.entry import train

    code = train(config)
    distributed.shutdown()
    return code


if __name__ == "__main__":
    run_command(main)
