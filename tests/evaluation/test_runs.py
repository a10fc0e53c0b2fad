"""Evaluations go on where they stopped, with any number of ranks, and only with what they were."""

import dataclasses
import json

import pytest

from samba_megatron.evaluation import charts
from samba_megatron.evaluation.passkey import Passkey
from samba_megatron.evaluation.phonebook import Phonebook
from samba_megatron.evaluation.runs import evaluate
from samba_megatron.platform.distributed import Rank
from samba_megatron.platform.errors import UserError

ALONE = Rank(0, 1, 0, 1)


class Counting:
    """A suite that counts the cases it is asked to run."""

    def __init__(self, suite) -> None:
        self.suite, self.ran = suite, 0
        self.name = suite.name
        self.settings, self.cases = suite.settings, suite.cases
        self.batches, self.summary = suite.batches, suite.summary

    def run(self, subject, batch):
        self.ran += len(batch)
        return self.suite.run(subject, batch)


def test_an_interrupted_evaluation_goes_on(subject, tmp_path):
    suite = Passkey(lengths=(160, 200), depths=3, keys=2, batch_size=2)
    whole = evaluate(suite, subject, tmp_path / "whole", ALONE)
    assert whole is not None and whole.finished
    folder = tmp_path / "stopped"
    stopped = evaluate(suite, subject, folder, ALONE, seconds=0.0)
    assert stopped is not None and not stopped.finished and stopped.results["cases"] == 0
    lines = (tmp_path / "whole" / "cases-00000.jsonl").read_text().splitlines()
    # Five results by two ranks of another world, and half a line of a killed one.
    (folder / "cases-00000.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    (folder / "cases-00001.jsonl").write_text("\n".join(lines[4:6]) + "\n")
    counting = Counting(suite)
    outcome = evaluate(counting, subject, folder, ALONE)
    assert outcome is not None and outcome.finished
    assert counting.ran == 7
    assert outcome.results == whole.results == json.loads((folder / "results.json").read_text())


def test_a_folder_of_another_evaluation_is_refused(subject, tmp_path):
    suite = Phonebook(pairs=(5,), samples=1)
    evaluate(suite, subject, tmp_path, ALONE)
    with pytest.raises(UserError, match=r"holds another evaluation \(seed differ\)"):
        evaluate(dataclasses.replace(suite, seed=2), subject, tmp_path, ALONE)
    other = dataclasses.replace(subject, identity={"model": "/elsewhere"})
    with pytest.raises(UserError, match=r"\(model differ\): choose another folder"):
        evaluate(suite, other, tmp_path, ALONE)


@pytest.mark.parametrize(
    ("figures", "shown"),
    [
        (
            {"suite": "passkey", "accuracy": {"4096": 0.5, "8192": None}}
            | {"digits": {"4096": 0.7, "8192": None}}
            | {"accuracy_by_depth": {"4096": {"0": 1.0, "1": 0.0}, "8192": {"0": None, "1": None}}},
            ["4,096", "50 %", "70 %", "100 %", "at 1", "–"],
        ),
        (
            {"suite": "phonebook", "accuracy": {"20": 0.25, "40": None}}
            | {"tokens": {"20": 401.5, "40": None}},
            ["20", "402", "25 %", "–"],
        ),
        (
            {"suite": "perplexity", "perplexity": {"4096": 10.06, "8192": None}}
            | {"perplexity_of_last_stretch": {"4096": 10.06, "8192": None}},
            ["4,096", "10.060", "–"],
        ),
    ],
)
def test_tables_and_pictures_of_what_is_there_so_far(figures, shown, tmp_path):
    from rich.console import Console

    results = {**figures, "cases": 1, "of": 2}
    console = Console(width=120, record=True)
    console.print(charts.table(results))
    text = console.export_text()
    assert all(word in text for word in [*shown, "1 of 2 cases"])
    charts.plot(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
