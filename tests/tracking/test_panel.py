"""The live panel: on a real pseudo-terminal in a real run, narrow, and when it breaks."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from samba_megatron.tracking.console import RunConsole
from samba_megatron.tracking.panel import Panel, RunState, Sparkline
from tests.distributed.toy import ROOT, toy_config, write_dataset

_SIZE = ("COLUMNS", "LINES")
PATTERN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def train(step: int, **more: Any) -> dict[str, Any]:
    """A step's record."""
    return {
        "kind": "train",
        "time": time.time(),
        "step": step,
        "loss": 5 / step,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens": 1000 * step,
        "tokens_per_second": 500.0,
        "mfu": 0.41,
        "memory_gib": 3.5,
        "seconds": {"data": 0.1, "forward": 0.5, "backward": 1.0, "forward_backward": 1.5,
                    "optimizer": 0.2, "step": 2.0},
        **more,
    }  # fmt: skip


START = {
    "kind": "start",
    "step": 0,
    "config": {"name": "toy"},
    "run": {"steps": 20, "tokens": 20_000},
}


def checkpoint(seconds_ago: float) -> dict[str, Any]:
    """A save's record."""
    times = {"stall_seconds": 0.25, "write_seconds": 3.5, "commit_seconds": 0.04}
    return {"kind": "checkpoint", "time": time.time() - seconds_ago, "step": 5, **times}


def shown(state: RunState, width: int) -> str:
    """What the panel looks like, as text."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(Panel(console, state, "folder").render(width))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in PATTERN.sub("", text).splitlines())
    return PATTERN.sub("", text)


def test_everything_worth_a_glance_is_there() -> None:
    state = RunState()
    state.hear(START)
    assert "first step" in shown(state, 100)
    for step in range(1, 11):
        state.hear(train(step))
    state.hear(checkpoint(seconds_ago=75))
    state.hear({"kind": "validation", "step": 8, "sequence_length": 64, "loss": 1.25})
    state.hear({"kind": "skipped", "step": 9, "reason": "the loss is an outlier"})
    text = shown(state, 110)
    for part in (
        "toy", "0.5000", "10/20, 10K of 20K tokens, 50.0%", "500 tokens/s", "MFU 41.0%",
        "memory 3.5 GiB", "ETA 20.0s", "step 2 s", "backward 50%", "step 5, 1m1",
        "the loop stood 0.25 s", "writing 3.50 s", "publishing 0.04 s", "1.2500 at 64 tokens",
        "1 skipped; step 9: the loss is an outlier",
    ):  # fmt: skip
        assert part in text
    assert "█▄" in text
    for width in (20, 40, 60, 80, 300):
        assert "0.5000" in shown(state, width)


def test_a_record_that_lacks_things_is_shown_without_them() -> None:
    """An older checkpoint's, a CPU's, a loss that was not finite."""
    state = RunState()
    state.hear(train(1, loss=None, mfu=None, seconds={"step": 1.0}))
    text = shown(state, 80)
    assert "not finite" in text and "MFU" not in text and "ETA" not in text


def test_a_curve_of_any_length_fits() -> None:
    line = Sparkline(capacity=16)
    for value in range(1000):
        line.add(float(value))
    drawn = line.draw(40)
    assert 8 <= len(drawn) <= 16
    assert list(drawn) == sorted(drawn) and (drawn[0], drawn[-1]) == ("▁", "█")
    assert line.draw(3) in ("▁▅█", "▁▄█", "▁▅█") and line.draw(0) == ""


def test_a_broken_panel_is_one_warning_and_plain_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A record that nobody expected must not end the training."""
    console = RunConsole(tmp_path, speaks=True, progress="live")
    console.hear(START)
    console.start(20)
    console.hear(train(1))
    console.hear({"kind": "train", "step": 2})
    console._on_panel(lambda panel: panel.draw(force=True))
    console.hear(train(3))
    console.step(train(3), 20, 34.0)
    console.stop()
    output = PATTERN.sub("", capsys.readouterr().out)
    assert output.count("the live panel failed") == 1
    assert "step 3/20 loss 1.6667 | lr 1.00e-03 | grad 0.500 | 3K tokens | 500 tok/s" in output
    log = (tmp_path / "log.txt").read_text()
    assert log.count("the live panel failed") == 1 and "step 3/20 loss 1.6667" in log


def test_drawing_costs_next_to_nothing(tmp_path: Path) -> None:
    """Ten thousand steps in a row: drawn twice a second, not ten thousand times."""
    state, stream = RunState(), io.StringIO()
    panel = Panel(Console(file=stream, width=100, force_terminal=True), state, "run")
    panel.start()
    started = time.process_time()
    for step in range(1, 10_001):
        state.hear(train(step))
        panel.draw()
    spent = time.process_time() - started
    panel.stop()
    assert spent / 10_000 < 1e-3
    assert stream.getvalue().count("tokens/s") < 60


class Terminal:
    """A pseudo-terminal in which a command runs."""

    def __init__(self, command: list[str], columns: int) -> None:
        self.text = ""
        self._process, self._descriptor = pty.fork()
        if self._process == 0:
            os.chdir(ROOT)
            # readline sets COLUMNS and LINES behind Python's back; they overrule the terminal.
            here = {name: value for name, value in os.environ.items() if name not in _SIZE}
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored under a shell's &
            os.execve(command[0], command, here | {"TERM": "xterm", "OMP_NUM_THREADS": "1"})
        self._resize(columns)

    def _resize(self, columns: int) -> None:
        size = struct.pack("HHHH", 40, columns, 0, 0)
        fcntl.ioctl(self._descriptor, termios.TIOCSWINSZ, size)

    def until(self, text: str, seconds: float = 200) -> None:
        """Reads until the text comes, or the command ends."""
        deadline = time.monotonic() + seconds
        while text not in PATTERN.sub("", self.text):
            assert time.monotonic() < deadline, self.text[-3000:]
            if not select.select([self._descriptor], [], [], 1)[0]:
                continue
            try:
                received = os.read(self._descriptor, 65536)
            except OSError:  # it has ended
                return
            self.text += received.decode(errors="replace")

    def narrow(self, columns: int) -> None:
        """As when somebody drags the window."""
        self._resize(columns)

    def press(self, keys: str) -> None:
        """As on a keyboard."""
        os.write(self._descriptor, keys.encode())

    def settings(self) -> list[Any]:
        """The terminal's own: echo, line by line, …"""
        return termios.tcgetattr(self._descriptor)

    def end(self) -> int:
        """The command's exit code."""
        self.until("\0never")
        return os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])

    def kill(self) -> None:
        """Nothing stays behind."""
        try:
            os.kill(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self._descriptor)


@pytest.mark.timeout(400)
def test_a_run_on_a_terminal_that_is_narrowed_and_interrupted(tmp_path: Path) -> None:
    """The panel, messages above it, another width, Ctrl-C; then the terminal is as before."""
    fields = toy_config(write_dataset(tmp_path), tmp_path / "run")
    fields |= {"training.train_steps": 100_000, "logging.progress": "auto", "name": "toy"}
    fields |= {
        "data.split": "90,10,0",
        "validation.eval_interval": 5,
        "validation.eval_tokens": 256,
    }
    command = [sys.executable, str(ROOT / "pretrain" / "pretrain_samba.py")]
    for name, value in fields.items():
        command += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    terminal = Terminal(command, 100)
    try:
        before = terminal.settings()
        terminal.until("step 5 validation")
        terminal.until("at 64 tokens · step 5")
        terminal.narrow(40)
        terminal.until("step 10 validation")
        assert terminal.settings() == before
        terminal.press("\x03")
        assert terminal.end() == 130
    finally:
        terminal.kill()
    text = PATTERN.sub("", terminal.text)
    titles = re.findall(r"── toy, [0-9ms.]+ ─*", text)
    assert len(titles[0]) == 100 and len(titles[-1]) == 40
    assert re.search(r"step +\d+/100000, [0-9.]+K? of 51.2M tokens", text)
    assert "tokens/s" in text and "ETA" in text and "none yet" in text
    assert re.search(r"[▁▂▃▄▅▆▇█]{3}", text)
    assert "Traceback" not in text and "panel failed" not in text
    # The last word on the cursor is that it shows, also while the panel is there.
    assert re.findall(r"\x1b\[\?25([hl])", terminal.text)[-1] == "h"
    assert "loss" in (tmp_path / "run" / "log.txt").read_text()
