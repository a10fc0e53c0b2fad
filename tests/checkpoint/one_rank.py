"""What test_one_rank runs in one process: faults, foreign checkpoints, and a run killed mid-write.

Writes what it found to ``results.json``.
"""

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from samba_megatron.checkpoint import folder as checkpoint_folder
from samba_megatron.checkpoint import state
from samba_megatron.checkpoint.inspect import inspect
from samba_megatron.config import RunConfig
from samba_megatron.platform import distributed
from samba_megatron.platform.errors import ExitWith, UserError
from tests.checkpoint.tiny_run import TinyRun, start, store_in, tiny_config

NAME = "step_000000{}"


def main(folder: Path) -> None:
    config = tiny_config()
    results: dict[str, Any] = {"killed": killed_while_writing(config, folder / "killed")}
    start(config)
    results["restart"] = restarted(config, folder / "killed")
    results["extra state"] = extra_state(config, folder / "extra")
    results["foreign"] = foreign(config, folder)
    results["weights only"] = weights_only(config, folder)
    results["corrupt"] = corrupt(config, folder)
    results["rollback"] = rolled_back(config, folder / "rollback")
    results["not finite"] = not_finite(config, folder / "rollback")
    results["disk"] = [disk_fault(config, folder / "rollback", blocking) for blocking in (0, 1)]
    results["size"] = size(config, folder / "rollback")
    results["rerun"] = rerun_pending(config, folder / "rerun")
    (folder / "results.json").write_text(json.dumps(results))
    distributed.shutdown()


def killed_while_writing(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Forks a run of its own, kills it with SIGKILL while its writer writes; what is left."""
    import megatron.core.dist_checkpointing  # noqa: F401  (once, for the fork and for this process)

    pid_file = folder.with_name("writer")  # outside: what is left inside is the run's alone
    run = os.fork()
    if run == 0:
        run_with_slow_disk(config, folder, pid_file)
    writer = wait_for_writer(folder, pid_file)
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    deadline = time.monotonic() + 60
    while lives(writer) and time.monotonic() < deadline:
        time.sleep(0.02)
    return {
        "writer lives": lives(writer),
        "left": sorted(path.suffix or path.name for path in folder.iterdir()),
        "latest": (folder / "latest").read_text(),
    }


def lives(pid: int) -> bool:
    """Whether it still does anything: where nobody asks for its end, a process stays a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def run_with_slow_disk(config: RunConfig, folder: Path, pid_file: Path) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    start(config)
    run = TinyRun(config)
    store = store_in(folder)
    run.train(1)
    store.save(run.state, blocking=True)
    module: Any = filesystem_async
    write = module._write_item

    def write_slowly(*args: Any, **kwargs: Any) -> Any:
        beside = pid_file.with_name(f"writer.{os.getpid()}")
        beside.write_text(str(os.getpid()))
        beside.replace(pid_file)  # who reads it reads all of it
        time.sleep(0.5)
        return write(*args, **kwargs)

    module._write_item = write_slowly
    run.train(2)
    store.save(run.state)
    while True:
        store.poll()
        time.sleep(0.01)


def wait_for_writer(folder: Path, pid_file: Path) -> int:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if list(folder.glob("*.writing/*.distcp")) and pid_file.exists():
            return int(pid_file.read_text())
        time.sleep(0.01)
    raise TimeoutError("nothing was written")


def restarted(config: RunConfig, folder: Path) -> dict[str, Any]:
    """The next start: what it says, what it goes on from, and whether that is the whole run."""
    notices: list[str] = []
    store, whole, run = store_in(folder, notices), TinyRun(config), TinyRun(config)
    whole.train(3)
    step = run.load(store).step
    run.train(3)
    store.save(run.state, blocking=True)
    return {
        "step": step,
        "same": run.fingerprint() == whole.fingerprint(),
        "left": sorted(path.name for path in folder.iterdir()),
        "notices": [notice.split(".")[0] for notice in notices],
    }


def extra_state(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Objects as Transformer Engine's modules keep them, in the checkpoint only or asked for."""
    plain, with_extra = TinyRun(config), TinyRun(config)
    add_extra_state(with_extra)
    plain.train(1)
    store_in(folder / "plain").save(plain.state, blocking=True)
    notices: list[str] = []
    with_extra.load(store_in(folder / "plain", notices))
    with_extra.train(2)
    store_in(folder / "extra").save(with_extra.state, blocking=True)
    again = TinyRun(config)
    again.load(store_in(folder / "extra", notices))
    return {
        "notices": [notice.replace(str(folder), "…") for notice in notices],
        "same": again.fingerprint() == with_extra.fingerprint(),
        "objects": inspect(folder / "extra")["objects"],
    }


def add_extra_state(run: TinyRun) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    module = run.state.modules[0]
    own = module.sharded_state_dict

    def with_extra(*args: Any, **kwargs: Any) -> Any:
        key = "decoder.layers.0.mixer.conv._extra_state"
        return {**own(*args, **kwargs), key: ShardedObject(key, b"scales", (1,), (0,))}

    module.sharded_state_dict = with_extra
    load = module.load_state_dict
    module.load_state_dict = lambda content, strict: load(
        {name: value for name, value in content.items() if not name.endswith("_extra_state")},
        strict,
    )


def foreign(config: RunConfig, folder: Path) -> dict[str, str]:
    """Refusals of checkpoints that hold another model."""
    source = str(folder / "extra" / "plain")

    def load(other: RunConfig) -> Callable[[], object]:
        return lambda: TinyRun(other).load(store_in(folder / "none", load=source))

    return {
        "hidden": refusal(load(tiny_config(hidden=64))),
        "deeper": refusal(load(tiny_config(pattern="M-*-M"))),
        "shallower": refusal(load(tiny_config(pattern="M-*"))),
    }


def weights_only(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Weights without, then with, the wish for nothing else."""
    trained = TinyRun(config)
    trained.train(2)
    bare = state.TrainState(trained.state.model, progress=trained.state.progress)
    store_in(folder / "bare").save(bare, blocking=True)
    source: dict[str, Any] = {"load": str(folder / "bare" / NAME.format(2))}
    error = refusal(lambda: TinyRun(config).load(store_in(folder / "none", **source)))
    run = TinyRun(config)
    progress = run.load(store_in(folder / "none", load_weights_only=True, **source))
    main = run.state.optimizer.chained_optimizers[0].optimizer.param_groups[0]["params"][0]  # type: ignore[union-attr]
    other = trained.state.optimizer.chained_optimizers[0].optimizer.param_groups[0]["params"][0]  # type: ignore[union-attr]
    return {
        "error": error,
        "step": progress.step,
        "weights": weights_equal(run, trained) and torch.equal(main, other),
    }


def corrupt(config: RunConfig, folder: Path) -> dict[str, Any]:
    """A bit of a tensor turned over in the latest checkpoint; then none that is whole."""
    copy = folder / "corrupt"
    shutil.copytree(folder / "killed", copy)
    turn_a_bit(next((copy / NAME.format(3)).glob("*.distcp")))
    notices: list[str] = []
    step = TinyRun(config).load(store_in(copy, notices)).step
    kept = held(lambda: store_in(copy, fall_back=False).find())
    unchecked = TinyRun(config).load(store_in(copy, verify_on_load=False)).step
    truncate(next((copy / NAME.format(1)).glob("*.distcp")))
    none = held(lambda: store_in(copy).find())
    return {
        "step": step,
        "unchecked": unchecked,
        "notices": [notice.replace(str(copy), "…") for notice in notices],
        "kept": kept.replace(str(copy), "…"),
        "none": none.replace(str(copy), "…"),
    }


def turn_a_bit(path: Path) -> None:
    """In the middle, where nothing but a tensor's numbers can be."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def held(action: Callable[[], object]) -> str:
    """Why a person must look."""
    try:
        action()
    except ExitWith as stop:
        assert (stop.code, stop.cause) == (76, "corrupt checkpoint")
        return stop.reason
    return ""


def rolled_back(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Steps 1 to 4 with keep_last 2; then back to 3 by hand and on to 4 again."""
    run, store = TinyRun(config), store_in(folder, keep_last=2)
    for step in range(1, 5):
        run.train(step)
        store.save(run.state)
    store.close()
    kept = sorted(path.name for path in folder.iterdir())
    (folder / "latest").write_text(NAME.format(3) + "\n")
    before = (folder / NAME.format(4)).stat().st_ino
    again, store = TinyRun(config), store_in(folder, keep_last=2)
    again.load(store)
    repeated = store.save(again.state, blocking=True)
    again.train(4)
    store.save(again.state, blocking=True)
    store.close()
    return {
        "kept": kept,
        "repeated": repeated,
        "replaced": (folder / NAME.format(4)).stat().st_ino != before,
        "left": sorted(path.name for path in folder.iterdir()),
    }


def not_finite(config: RunConfig, folder: Path) -> dict[str, Any]:
    """What saving says to a NaN among the weights, and to one among the moments."""
    outcome: dict[str, Any] = {}
    for where in ("weights", "moments"):
        run = TinyRun(config)
        run.train(5)
        part: Any = run.state.optimizer.chained_optimizers[0]  # type: ignore[union-attr]
        with torch.no_grad():
            if where == "weights":
                next(run.state.modules[0].parameters()).view(-1)[5] = float("nan")
            else:
                next(iter(part.optimizer.state.values()))["exp_avg_sq"][3] = float("inf")
        try:
            store_in(folder).save(run.state)
        except ExitWith as stop:
            outcome[where] = [int(stop.code), stop.reason]
    return {**outcome, "latest": (folder / "latest").read_text().strip()}


def disk_fault(config: RunConfig, folder: Path, blocking: int) -> dict[str, Any]:
    """A disk that takes no more than a few bytes a file; then room again."""
    run, store = TinyRun(config), store_in(folder)
    run.train(5 + blocking)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        error = refusal(lambda: (store.save(run.state, blocking=bool(blocking)), store.wait()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    latest = (folder / "latest").read_text().strip()
    left = [path.name for path in folder.iterdir() if path.suffix]
    report = store.save(run.state, blocking=True)
    return {
        "error": error.replace(str(folder), "…"),
        "latest": latest,
        "left": left,
        "then": report.path.name,
    }


def size(config: RunConfig, folder: Path) -> dict[str, Any]:
    """The size foreseen, and what inspect finds."""
    content = inspect(folder)
    tensors = [*content["weights"].values(), *content["optimizer"].values()]
    found = checkpoint_folder.find_latest(folder)
    assert found is not None
    return {
        "foreseen": state.estimate_bytes(TinyRun(config).state),
        "tensors": sum(tensor["bytes"] for tensor in tensors),
        "on disk": found.manifest.bytes,
        "problem": content["problem"],
        "embedding": content["weights"]["embedding.word_embeddings.weight"],
        "parameters": content["manifest"]["parameters"],
        "counted": sum(p.numel() for p in TinyRun(config).state.modules[0].parameters()),
        "objects": content["objects"],
    }


def rerun_pending(config: RunConfig, folder: Path) -> dict[str, Any]:
    """A step that the rerun state machine wants repeated after a restart, with its batches."""
    from megatron.core.rerun_state_machine import (
        RerunDataIterator,
        RerunMode,
        RerunState,
        get_rerun_state_machine,
    )

    run, machine = TinyRun(config), get_rerun_state_machine()
    run.train(1)
    machine.set_mode(RerunMode.VALIDATE_RESULTS)
    machine.state = RerunState.WILL_RERUN_FROM_CHECKPOINT
    iterator = RerunDataIterator(iter([torch.arange(3), torch.arange(4)]))
    next(iterator)
    run.state.data_iterator = iterator
    store_in(folder).save(run.state, blocking=True)
    machine.state, machine.data_iterator_checkpoints = RerunState.NOT_RUNNING_YET, None
    run.load(store_in(folder))
    (saved,) = machine.data_iterator_checkpoints
    outcome = {
        "state": machine.state.name,
        "batches": [batch.tolist() for batch in saved["saved_microbatches"]],
    }
    machine.set_mode(RerunMode.DISABLED)
    return outcome


def weights_equal(one: TinyRun, other: TinyRun) -> bool:
    pairs = zip(one.state.modules[0].parameters(), other.state.modules[0].parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def refusal(action: Callable[[], object]) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
