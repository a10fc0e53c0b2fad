"""What holds for all tests: few threads, no network, no deadlines of Hypothesis, and skips for what
the machine lacks."""

import os
import shutil
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported: tests share the cores, with each other and with the ranks they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing here is downloaded; a test that tries must fail, not wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Over Hypothesis's own profile, by which the cases are always the same in continuous integration.
# A slow machine is no fault of what is tested. (Programs that tests start do not see this.)
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

SLURM_COMMANDS = ("slurmctld", "slurmd", "munged", "sbatch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked ``gpu`` and ``slurm`` where there is no GPU or no Slurm."""
    _skip(items, "gpu", "needs an NVIDIA GPU", _has_gpu)
    _skip(items, "slurm", f"needs {', '.join(SLURM_COMMANDS)}", _has_slurm)


def _skip(items: list[pytest.Item], marker: str, reason: str, available) -> None:
    marked = [item for item in items if item.get_closest_marker(marker)]
    if marked and not available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _has_slurm() -> bool:
    if os.environ.get("CI"):
        return True  # there they must run, and fail where Slurm lacks
    # Daemons lie in sbin, which is not on every user's PATH.
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    return all(shutil.which(command, path=path) for command in SLURM_COMMANDS)


@pytest.fixture(scope="session")
def own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies an export's code to a cache before it runs it: a cache for the tests.

    One for all of them: what is imported from it once is not looked for in another."""
    import transformers.dynamic_module_utils
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
        yield
