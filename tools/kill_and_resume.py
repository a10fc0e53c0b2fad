"""Kills a run without warning, again and again, and shows that it ends as if nothing had been.

    python tools/kill_and_resume.py --kills 10 --output killed --processes 2 -- \
        --config samba_tiny --data.data_path '["data/train"]' --checkpoint.save_interval 5

The configuration after ``--`` is run twice: undisturbed, and with all its processes killed
(SIGKILL) at random moments, also in the middle of a background save. Each restart is the same
command. The training losses of the two must be equal to the last bit, step by step.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from samba_megatron.platform.errors import UserError, run_command  # noqa: E402
from samba_megatron.tracking.metrics import FILE_NAME, read_metrics  # noqa: E402


@dataclass(frozen=True)
class Kill:
    """One kill, as it was found."""

    step: int
    """Last step that the metrics had."""
    published: list[str]
    """Checkpoints there were."""
    while_saving: bool
    """Whether a checkpoint was being written."""


def main() -> None:
    """Runs both and compares."""
    args = parse_arguments()
    undisturbed, killed = args.output / "undisturbed", args.output / "killed"
    print("undisturbed run …", flush=True)
    finish(args, undisturbed)
    chance = random.Random(args.seed)
    kills = []
    for number in range(args.kills):
        kill = start_and_kill(args, killed, chance)
        if kill is None:
            print("the run ended before the next kill: give it more steps", flush=True)
            break
        kills.append(kill)
        when = " while saving" if kill.while_saving else ""
        print(f"kill {number + 1}/{args.kills} after step {kill.step}{when}", flush=True)
    finish(args, killed)
    steps = compare(undisturbed, killed)
    (args.output / "kills.json").write_text(json.dumps([asdict(kill) for kill in kills], indent=1))
    saving = sum(kill.while_saving for kill in kills)
    print(f"{len(kills)} kills ({saving} while saving): all {steps} losses equal, bit for bit")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--longest-wait", type=float, default=4.0, help="seconds after a step")
    parser.add_argument("config", nargs="+", help="the run, after --")
    return parser.parse_args()


def start(args: argparse.Namespace, run_dir: Path) -> subprocess.Popen[bytes]:
    """Starts (or continues) the run; its output goes to a log beside its folder."""
    args.output.mkdir(parents=True, exist_ok=True)
    with open(args.output / f"{run_dir.name}.log", "ab") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node", str(args.processes)),
                *(str(ROOT / "pretrain" / "pretrain_samba.py"), *args.config),
                *("--run_dir", str(run_dir)),
            ],
            stdout=log,
            stderr=log,
        )


def finish(args: argparse.Namespace, run_dir: Path) -> None:
    """Runs to the end.

    Raises:
        UserError: if it fails; the log says why.
    """
    if start(args, run_dir).wait():
        raise UserError(f"the run in {run_dir} failed: see {args.output / run_dir.name}.log")


def start_and_kill(args: argparse.Namespace, run_dir: Path, chance: random.Random) -> Kill | None:
    """Starts the run, lets it do a step at least, and kills every process of it."""
    metrics = run_dir / FILE_NAME
    lines_before = count_steps(metrics)
    process = start(args, run_dir)
    while count_steps(metrics) <= lines_before:
        if process.poll() is not None:
            return None
        time.sleep(0.05)
    time.sleep(chance.uniform(0.0, args.longest_wait))
    if process.poll() is not None:
        return None
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    folders = sorted(path.name for path in run_dir.glob("checkpoints/step_*"))
    for member in family:
        member.kill()
    process.wait()
    return Kill(
        step=read_metrics(metrics, "train")[-1]["step"],
        published=[name for name in folders if "." not in name],
        while_saving=any(name.endswith(".writing") for name in folders),
    )


def count_steps(metrics: Path) -> int:
    """Step lines written so far, repeated ones included."""
    if not metrics.exists():
        return 0
    return metrics.read_bytes().count(b'"kind": "train"')


def compare(undisturbed: Path, killed: Path) -> int:
    """The number of steps, all with equal losses.

    Raises:
        UserError: naming the first step that differs.
    """
    first, second = (
        {r["step"]: r["loss"] for r in read_metrics(folder / FILE_NAME, "train")}
        for folder in (undisturbed, killed)
    )
    if first.keys() != second.keys():
        raise UserError(f"{undisturbed} has {len(first)} steps and {killed} has {len(second)}")
    for step, loss in first.items():
        if second[step] != loss:
            raise UserError(f"step {step}: loss {loss} undisturbed, {second[step]} when killed")
    return len(first)


if __name__ == "__main__":
    run_command(main)
