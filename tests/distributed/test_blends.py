"""A blend that changes in the middle of a run, by a stage or by a person who resumes it."""

import json
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from samba_megatron.data.indexed import IndexedWriter
from samba_megatron.tracking.metrics import read_metrics
from tests.distributed.toy import launch, losses, toy_config

LENGTH, BATCH, CHANGE, STEPS = 64, 8, 5, 9
BEFORE, AFTER = {"web": 0.75, "code": 0.25}, {"web": 0.25, "code": 0.75}


def write_sources(folder: Path) -> None:
    """Two datasets of byte tokens; the smaller is read more than once in the run."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for name, chosen in (("web", paths[:30]), ("code", paths[30:32])):
        with IndexedWriter(folder / name, np.uint16) as writer:
            for path in chosen:
                text = path.read_bytes()[:800] + b"\0"
                writer.add_document(np.frombuffer(text, dtype=np.uint8).astype(np.uint16))
            writer.finish()


def blend_file(path: Path, weights: dict[str, float], **more: Any) -> list[str]:
    sources = [{"name": n, "prefix": n, "weight": w} for n, w in weights.items()]
    path.write_text(yaml.safe_dump({"sources": sources, **more}))
    return [str(path)]


def consumed(run_dir: Path) -> dict[int, dict[str, int]]:
    """Samples by source, by step, as the run recorded them."""
    return {
        record["step"]: {n: c["samples"] for n, c in record["consumed_by_source"].items()}
        for record in read_metrics(run_dir / "metrics.jsonl", "data")
    }


@pytest.mark.timeout(600)
def test_a_blend_changed_at_a_resume_is_one_with_a_stage(tmp_path: Path) -> None:
    """Both read the same samples, so the losses are equal bit for bit; and the ledger is kept."""
    write_sources(tmp_path)
    stages = [{"until_tokens": CHANGE * BATCH * LENGTH, "weights": BEFORE}]
    staged = blend_file(tmp_path / "staged.yaml", AFTER, stages=stages)
    before = blend_file(tmp_path / "before.yaml", BEFORE)
    after = blend_file(tmp_path / "after.yaml", AFTER)

    def config(name: str, blend: list[str], **fields: Any) -> dict[str, Any]:
        more = {"data.data_path": [], "data.blend_file": blend, "training.train_steps": STEPS}
        return toy_config("", tmp_path / name, **more, **fields)

    whole = config("whole", staged)
    first = config("changed", before, **{"training.exit_step": CHANGE})
    second = config("changed", after, **{"data.num_workers": 3, "training.micro_batch_size": 2})
    specs: list[dict[str, Any]] = [
        {"name": "whole", "config": whole},
        {"name": "first", "config": first, "exit_code": 75},
        {"name": "second", "config": second},
    ]
    launch(1, specs, tmp_path)
    assert losses(tmp_path / "changed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == STEPS
    counts = consumed(tmp_path / "changed")
    assert counts[CHANGE] == {"web": 30, "code": 10}
    assert counts[STEPS] == {"web": 30 + 8, "code": 10 + 24}
    assert consumed(tmp_path / "whole")[STEPS] == counts[STEPS]
    log = (tmp_path / "changed" / "log.txt").read_text()
    assert "shares of the blend have changed: web from 0.75 to 0.25" in log
    (saved,) = (tmp_path / "changed" / "checkpoints").glob("step_*")
    manifest = json.loads(next(saved.glob("*manifest*.json")).read_text())
    by_name = {e["name"]: e["samples"] for e in manifest["data_consumed"]["sources"].values()}
    assert by_name == counts[CHANGE]
