"""A run that is over leaves its memory and its threads to the next one in the same process."""

import gc
import time
from pathlib import Path
from weakref import WeakSet

from megatron.core.distributed import DistributedDataParallel

from samba_megatron.platform.exits import ExitCode
from samba_megatron.training.entry import train
from tests.distributed.run_layouts import configure
from tests.distributed.toy import toy_config, write_dataset

GLOO_THREADS_OF_THE_WORLD = 8
"""And whatever else a process keeps once it has trained."""


def threads() -> int:
    """Of this process, the libraries' too."""
    return len(list(Path("/proc/self/task").iterdir()))


def threads_once_at_most(bound: int) -> int:
    """How many there are when the joined ones have gone, which takes the kernel a moment."""
    deadline = time.monotonic() + 10
    while threads() > bound and time.monotonic() < deadline:
        time.sleep(0.05)
    return threads()


def wrappers() -> set[DistributedDataParallel]:
    """Models in megatron's wrapper, which hold weights, gradients and process groups."""
    # By their types: a weak proxy of what is gone does not say what it is an instance of.
    return {t for t in gc.get_objects() if issubclass(type(t), DistributedDataParallel)}


def test_nothing_of_a_run_is_left(tmp_path: Path) -> None:
    gc.collect()
    prefix = write_dataset(tmp_path)
    # Other tests of this process may have left models that wait for a collection: those go at any
    # moment, so a count from before would say nothing.
    others, began = WeakSet(wrappers()), threads()
    for number in range(2):
        fields = {"training.train_steps": 3, "faults.skip_spikes": bool(number)}
        run = toy_config(prefix, tmp_path / str(number), **fields)
        assert train(configure(run)) == ExitCode.DONE
        assert gc.isenabled()
        assert not wrappers() - set(others)
        bound = began + GLOO_THREADS_OF_THE_WORLD
        assert threads_once_at_most(bound) <= bound
