"""What is made of the reports of a check of the nodes."""

import json
from pathlib import Path
from typing import Any

from slurm.lifecycle import read_reports

GOOD = {"ok": True, "problems": []}


def write(folder: Path, **reports: dict[str, Any]) -> Path:
    for name, report in reports.items():
        (folder / f"{name}.json").write_text(json.dumps(report))
    return folder


def test_all_good(tmp_path: Path) -> None:
    folder = write(tmp_path, n1=GOOD, n2=GOOD, across={**GOOD, "nodes": []})
    assert read_reports(folder, ["n1", "n2"]) == {}


def test_bad_silent_and_slow_nodes_are_named(tmp_path: Path) -> None:
    bad = {"ok": False, "problems": ["no room", "3 GPUs"]}
    across = {"ok": False, "problems": ["n3 is slow"], "nodes": ["n3"]}
    folder = write(tmp_path, n1=GOOD, n2=bad, n3=GOOD, across=across)
    assert read_reports(folder, ["n1", "n2", "n3", "n4"]) == {
        "n2": "no room; 3 GPUs",
        "n3": "n3 is slow",
        "n4": "gave no report of its check",
    }


def test_a_check_that_nobody_could_do_names_nobody(tmp_path: Path) -> None:
    assert read_reports(tmp_path, ["n1", "n2"]) == {}
