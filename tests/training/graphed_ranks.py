"""What test_graphed_runs runs on two ranks: a run without a graph, then with one that has no room
to spare. Each rank writes at which steps it recorded.

graphed_ranks.py FOLDER, which has the first run's ``config.json``.
"""

import json
import sys
from pathlib import Path

from samba_megatron.platform import distributed
from samba_megatron.training import graphed_schedule
from tests.training.rehearsal import launched, rehearsed


def main(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    launched(config)
    graphed_schedule._room = lambda documents: documents
    rehearsal = rehearsed({**config, "run_dir": str(folder / "replayed")})
    rank = distributed.Rank.from_environment().rank
    (folder / f"rank_{rank}.json").write_text(json.dumps(rehearsal.recorded_at))
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
