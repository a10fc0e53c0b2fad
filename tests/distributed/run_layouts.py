"""Runs training several times in one world, each run in its own layout: a launch costs ten
seconds, a run of a toy model a few.

SPECS.json: a list of runs, each ``{"name": …, "config": {dotted field: value, …}}``.
"""

import json
import sys
from pathlib import Path

from samba_megatron.config import RunConfig
from samba_megatron.platform import distributed
from samba_megatron.training.entry import train


def configure(fields: dict[str, object]) -> RunConfig:
    """A RunConfig with dotted fields set."""
    config = RunConfig()
    for dotted, value in fields.items():
        owner: object = config
        *groups, name = dotted.split(".")
        for group in groups:
            owner = getattr(owner, group)
        assert hasattr(owner, name), f"no such field: {dotted}"
        setattr(owner, name, value)
    return config


def main() -> None:
    """Runs every specification in order."""
    for spec in json.loads(Path(sys.argv[1]).read_text()):
        print(f"=== {spec['name']}", flush=True)
        code = train(configure(spec["config"]))
        assert int(code) == spec.get("exit_code", 0), (spec["name"], code)
    distributed.shutdown()


if __name__ == "__main__":
    main()
