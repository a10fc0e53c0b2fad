"""The report in a real browser: what it draws, what it says when pointed at; it asks nobody."""

import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samba_megatron.tracking import ledger
from samba_megatron.tracking.history import read_history
from samba_megatron.tracking.metrics import MetricsFile
from samba_megatron.tracking.report.page import render
from samba_megatron.tracking.report.thinning import averaged, running_mean, thinned

TOOL = Path(__file__).parents[2] / "tools" / "report.py"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="needs chromium on PATH"
)

CONFIG = {"name": "toy", "model": {"hidden_size": 64}, "optimizer": {"lr": 1e-3}}
NASTY = 'rank 3 </script><script>alert("x")</script> & more'


def write_start(metrics: MetricsFile, step: int, lr: float = 1e-3) -> None:
    """A life of the run begins after ``step``."""
    metrics.write(
        "start",
        step=step,
        device="Some GPU",
        parameters=1_000_000,
        layout={"world_size": 8},
        config={**CONFIG, "optimizer": {"lr": lr}},
        run={"steps": 300, "tokens": 307_200, "resumed": step > 0},
    )


def write_steps(metrics: MetricsFile, first: int, last: int, loss: float = 8.0) -> None:
    """Steps as the loop records them; the loss tells in which life a step was done."""
    for step in range(first, last + 1):
        metrics.write(
            "train",
            step=step,
            loss=float("nan") if step == 33 else loss / math.sqrt(step),
            lr=1e-3 * step,
            grad_norm=0.5,
            tokens=1024 * step,
            tokens_per_second=1e4 + step,
            mfu=0.4,
            memory_gib=1.0 + step / 1000,
            seconds={"data": 0.01, "forward": 0.2, "backward": 0.4, "optimizer": 0.1, "step": 0.8},
        )


def write_run(folder: Path, lr: float = 1e-3) -> Path:
    """120 steps; killed after 80 with a torn line, resumed from 60; a hang is in the ledger."""
    metrics = MetricsFile(folder)
    write_start(metrics, 0, lr)
    write_steps(metrics, 1, 80)
    metrics.write("validation", step=60, tokens=61440, sequence_length=64, loss=2.5, perplexity=12)
    metrics.write("checkpoint", step=60, path="x", stall_seconds=0.3, write_seconds=2.0,
                  commit_seconds=0.01)  # fmt: skip
    metrics.close()
    ledger.append(folder, "start", step=0, world_size=8, nodes=["node-1"], resumed=False)
    ledger.append(folder, "hang", step=80, seen="no step for 600 s", sentences=[NASTY], job=7)
    ledger.append(folder, "start", step=60, world_size=8, nodes=["node-2"], resumed=True)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 81, "lo')
    metrics = MetricsFile(folder)
    write_start(metrics, 60, lr)
    write_steps(metrics, 61, 120, loss=4.0)
    source = {"samples": 100, "tokens": 102400, "epochs": 0.5}
    metrics.write("data", step=120, consumed_by_source={"web": source, "code": source})
    metrics.close()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 121, "lo')
    return folder


def write_report(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


# Points at the loss, toggles its scale and the axis, hides a run; what it saw stays in the page.
ACTIONS = """
<script>
  const seen = {};
  const loss = document.querySelector("figure");
  const path = () => loss.querySelectorAll("path.curve")[1].getAttribute("d");
  const point = (figure, share) => {
    const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
    const across = svg.viewBox.baseVal.width, x = 52 + share * (across - 66);
    const where = { clientX: box.left + x * box.width / across, clientY: box.top + 40 };
    svg.dispatchEvent(new PointerEvent("pointermove", where));
    return figure.querySelector(".tip").innerText;
  };
  seen.early = point(loss, 59 / 119);
  seen.tip = point(loss, 89 / 119);
  seen.cross = loss.querySelector(".cross").getAttribute("visibility");
  seen.linear = path();
  loss.querySelector("button").click();
  seen.log = path();
  const names = [...document.querySelectorAll("#controls button")];
  seen.axes = names.map((button) => (button.click(), loss.querySelector("svg").textContent));
  const boxes = document.querySelectorAll("#controls input");
  seen.before = document.querySelectorAll("figure path").length;
  if (boxes.length) boxes[0].click();
  seen.after = document.querySelectorAll("figure path").length;
  seen.wide = document.documentElement.scrollWidth <= window.innerWidth;
  seen.requests = performance.getEntriesByType("resource").length;
  document.body.dataset.seen = JSON.stringify(seen);
</script>
"""


class Page:
    """A report as chromium shows it."""

    def __init__(self, report: Path, width: int = 1200) -> None:
        assert CHROMIUM is not None, "CI must have chromium"
        tried = report.with_name("tried.html")
        tried.write_text(report.read_text().replace("</body>", f"{ACTIONS}</body>"))
        done = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--enable-logging=stderr", f"--user-data-dir={report.parent / 'profile'}",
             "--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={width},900",
             "--dump-dom", tried.as_uri()],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        self.dom = done.stdout
        # The page's own policy refuses every request, and each refusal is a complaint.
        self.complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        found = re.search(r'data-seen="([^"]*)"', self.dom)
        assert found, self.complaints
        self.seen: dict[str, Any] = json.loads(html.unescape(found[1]))


@needs_browser
def test_a_run_in_the_browser(tmp_path: Path) -> None:
    """Resumed, torn, with a NaN and a text that is HTML: all is drawn, nothing is asked for."""
    run = write_run(tmp_path / "a run")
    done = write_report(run)
    assert (done.returncode, done.stdout) == (0, f"{run}/report.html\n"), done.stderr
    page = Page(run / "report.html")
    assert page.complaints == []
    assert page.seen["requests"] == 0 and "default-src 'none'" in page.dom
    for title in ("loss", "learning rate", "gradient norm", "throughput", "MFU", "memory"):
        assert f'aria-label="{title}"' in page.dom
    assert 'aria-label="time of a step"' in page.dom and 'aria-label="checkpoints"' in page.dom
    assert len(re.findall(r'<path [^>]*d="M[0-9.]+ [0-9.]+L', page.dom)) >= 12
    # Under the pointer: step 60 with its validation, step 90 in its second life.
    assert page.seen["early"].startswith("step 60, 61.44K tokens")
    assert "training, each step: 1.0328" in page.seen["early"]
    assert "held out, 64 tokens: 2.5" in page.seen["early"]
    assert page.seen["tip"].startswith("step 90, 92.16K tokens")
    assert "training, each step: 0.42164" in page.seen["tip"]
    assert "held out" not in page.seen["tip"]
    assert page.seen["cross"] == "visible"
    assert page.seen["linear"] != page.seen["log"]
    axes = [re.findall("tokens|steps|hours", axis) for axis in page.seen["axes"]]
    assert axes == [["tokens"], ["steps"], ["hours"]]
    # The hang, the restart and the NaN are marked, and the hang's text stays a text.
    assert {"fault", "restart"} <= set(re.findall(r'class="mark (\w+)"', page.dom))
    assert html.escape(NASTY, quote=False) in page.dom
    assert "20 steps were lost and done again" in page.dom


@needs_browser
def test_runs_compared_on_a_narrow_screen(tmp_path: Path) -> None:
    """Each run at the pointer, one hidden, and the one field that differs."""
    runs = [write_run(tmp_path / name, lr) for name, lr in (("one", 1e-3), ("two", 2e-3))]
    done = write_report(*runs, "--output", tmp_path / "both.html")
    assert done.returncode == 0, done.stderr
    page = Page(tmp_path / "both.html", width=500)
    assert page.complaints == [] and page.seen["requests"] == 0
    assert page.seen["wide"], "the page scrolls sideways"
    assert "one, training, each step: " in page.seen["tip"]
    assert "two, training, each step: " in page.seen["tip"]
    assert page.seen["after"] < page.seen["before"], "a hidden run is still drawn"
    differences = page.dom.split("differences of the configurations")[1]
    assert re.findall(r"<th>([a-z_.]+)</th><td>([^<]*)</td><td>([^<]*)</td>", differences) == [
        ("optimizer.lr", "0.001", "0.002")
    ]


def test_the_last_life_of_a_step_counts(tmp_path: Path) -> None:
    """Steps left behind by a resume are gone, too, as long as they were not done again."""
    run = write_run(tmp_path / "run")
    history = read_history(run)
    assert history.train["step"].tolist() == list(range(1, 121))
    expected = [8 / math.sqrt(step) for step in range(1, 61)]
    expected += [4 / math.sqrt(step) for step in range(61, 121)]
    expected[32] = math.nan
    np.testing.assert_allclose(history.train["loss"], expected)
    assert history.redone_steps == 20
    metrics = MetricsFile(run)
    write_start(metrics, 100)
    metrics.close()
    assert read_history(run).train["step"][-1] == 100


def test_a_million_steps_are_a_small_file(tmp_path: Path) -> None:
    """A spike of one step stays in sight. Here 50,000 steps; the size does not depend on it."""
    line = '{"kind": "train", "time": %d, "step": %d, "loss": %g, "lr": 0.001, "tokens": %d}\n'
    steps = 50_000
    with open(tmp_path / "metrics.jsonl", "w") as file:
        file.writelines(
            line % (step, step, 99.5 if step == 27_777 else 2 + 1e-6 * step, 1000 * step)
            for step in range(1, steps + 1)
        )
    started = time.process_time()
    page = render([read_history(tmp_path)])
    assert time.process_time() - started < 10
    assert len(page) < 1_000_000
    assert "99.5" in page and "27777" in page


def test_thinning_keeps_extremes_and_gaps() -> None:
    steps, values = np.arange(1.0, 1001.0), np.sin(np.arange(1000.0))
    values[500], values[700:800] = 50.0, np.nan
    kept, shown = thinned(steps, values, 100)
    assert len(kept) <= 100 and (np.diff(kept) > 0).all()
    assert shown[kept == 501] == [50.0]
    assert np.isnan(shown[(kept > 710) & (kept < 790)]).all()
    assert np.isnan(shown).any() and np.nanmin(shown) == np.nanmin(values)
    _, means = averaged(steps, np.ones(1000), 7)
    assert means.tolist() == [1.0] * 7
    np.testing.assert_allclose(running_mean(np.array([1.0, np.nan, 3.0, 5.0]), 2), [1, 1, 3, 4])


@pytest.mark.parametrize("lines", ["", '{"kind": "start", "time": 1}\n', '{"kind": "train"}\n{"ki'])
def test_a_run_of_which_there_is_little(tmp_path: Path, lines: str) -> None:
    """Missing fields are left out of the report, not invented."""
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert "none yet" in render([read_history(tmp_path)])


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    done = write_report(tmp_path)
    assert done.returncode == 2
    path = tmp_path / "metrics.jsonl"
    assert done.stderr == (
        f"error: {path} does not exist: name the folder of a run that has begun\n"
    )
    path.write_text("")
    done = write_report(tmp_path, "--output", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
