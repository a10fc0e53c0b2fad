"""The set-up script where it must refuse or repair, and where there is nothing to do.

What it does on a bare machine is tried by continuous integration, which starts from a fresh clone.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _copy_of_the_set_up(folder: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "tools/setup_environment.sh"):
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, target)
    return folder


def _run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_names_what_is_missing_when_no_python_3_12_is_found(tmp_path):
    folder = _copy_of_the_set_up(tmp_path / "clone")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("python3.12", "python3", "python", "uv", "nvidia-smi"):
        (commands / name).write_text("#!/bin/sh\nexit 127\n")
        (commands / name).chmod(0o755)
    path = f"{commands}:/usr/bin:/bin"
    result = _run(folder, "make", "setup", PATH=path, HOME=str(tmp_path), PYENV_ROOT="", PYTHON="")
    assert result.returncode == 2
    assert "error: no Python 3.12 with venv found: install one" in result.stderr
    assert not (folder / ".venv").exists()


def test_refuses_an_interpreter_that_is_not_python_3_12_and_a_wrong_option(tmp_path):
    folder = _copy_of_the_set_up(tmp_path)
    result = _run(folder, "tools/setup_environment.sh", PYTHON="/bin/false")
    assert result.returncode == 2
    assert result.stderr.startswith("error: PYTHON=/bin/false is not a working Python 3.12")
    result = _run(folder, "tools/setup_environment.sh", "--cpu")
    assert result.returncode == 2
    assert result.stderr.startswith("error: usage:")


def test_starts_over_where_a_set_up_was_cut_off(tmp_path):
    folder = _copy_of_the_set_up(tmp_path)
    leftover = folder / ".venv" / "lib" / "half.py"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    result = _run(folder, "tools/setup_environment.sh", PYTHON="/bin/false")
    assert ".venv is incomplete" in result.stdout
    assert not leftover.exists()


def test_does_nothing_when_all_is_there(tmp_path):
    folder = _copy_of_the_set_up(tmp_path)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
    result = _run(folder, "make", "--dry-run", "setup")
    assert "setup_environment.sh" in result.stdout
    (folder / ".venv" / ".ready").touch()
    result = _run(folder, "make", "--dry-run", "setup")
    assert result.returncode == 0
    assert "setup_environment.sh" not in result.stdout
