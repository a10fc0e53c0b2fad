"""Publishing, retention, corruption and fallback, with plain files for a checkpoint's content."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from samba_megatron.checkpoint import folder
from samba_megatron.checkpoint.manifest import (
    FILE_NAME,
    METADATA,
    CorruptCheckpoint,
    Manifest,
    Slice,
    config_hash,
    file_hash,
    file_sizes,
    read_manifest,
    verify,
    write_manifest,
)
from samba_megatron.platform.errors import UserError


def write(path: Path, step: int) -> Path:
    """Everything of a checkpoint, in a folder that is still being written."""
    (path / METADATA).write_bytes(b"index")
    (path / "__0_0.distcp").write_bytes(b"tensors" * 10 + b"common")
    (path / "__1_0.distcp").write_bytes(b"more" * step)
    config = {"model": {"hidden_size": 64}}
    write_manifest(
        path,
        Manifest(
            step=step,
            consumed_samples=8 * step,
            consumed_tokens=80 * step,
            parameters=1000,
            layout={"world_size": 2},
            versions={"torch": "2"},
            config=config,
            config_sha256=config_hash(config),
            data_identity={},
            created="2026-01-01T00:00:00+00:00",
            metadata_sha256=file_hash(path / METADATA),
            common_state=Slice(
                "__0_0.distcp", 70, 6, file_hash(path / "__0_0.distcp", offset=70, length=6)
            ),
            files=file_sizes(path),
        ),
    )
    return path


def publish(root: Path, *steps: int) -> None:
    for step in steps:
        folder.publish(write(folder.begin(root, step), step))


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_tools_need_no_torch():
    code = "import sys, samba_megatron.checkpoint.folder as f; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_nothing_is_visible_before_it_is_published(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    writing = folder.begin(root, 100)
    assert re.fullmatch(r"step_0000100\.[0-9a-f]{8}\.writing", writing.name)
    assert folder.list_checkpoints(root) == []
    assert folder.find_latest(root) is None
    with pytest.raises(RuntimeError, match="not finished"):
        folder.publish(writing)

    path, replaced = folder.publish(write(writing, 100))
    assert (path, replaced) == (root / "step_0000100", None)
    assert names(root) == ["latest", "step_0000100"]
    assert (root / "latest").read_text() == "step_0000100\n"
    found = folder.find_latest(root)
    assert found is not None and found.path == path and found.notices == []
    assert found.manifest.step == 100 and found.manifest.bytes == 5 + 76 + 400


def test_a_step_beyond_seven_digits(tmp_path):
    publish(tmp_path, 12_345_678)
    assert folder.read_latest(tmp_path) == "step_12345678"
    assert folder.checkpoint_step("step_12345678") == 12_345_678


@pytest.mark.parametrize(
    "name",
    ["step_1", "step_0000001.tmp", "step_0000001.12345678.writing", "iter_0000001", "latest"],
)
def test_other_names_are_no_checkpoints(name):
    assert folder.checkpoint_step(name) is None


def test_clean_removes_only_what_was_interrupted(tmp_path):
    publish(tmp_path, 1, 2)
    write(folder.begin(tmp_path, 3), 3)
    (tmp_path / "step_0000001").rename(tmp_path / "step_0000001.0a0b0c0d.deleting")
    (tmp_path / ".latest.partial").write_text("step")
    (tmp_path / "mine.writing").mkdir()
    removed = folder.clean(tmp_path)
    assert sorted(path.suffix for path in removed) == [".deleting", ".writing"]
    assert names(tmp_path) == ["latest", "mine.writing", "step_0000002"]
    assert folder.clean(tmp_path / "absent") == []


def test_remove_touches_nothing_published(tmp_path):
    publish(tmp_path, 1)
    with pytest.raises(ValueError, match="not set aside"):
        folder.remove(tmp_path / "step_0000001")


def retire(root: Path, keep_last: int, milestone_interval: int | None = None) -> list[str]:
    folder.remove(*folder.retire(root, keep_last, milestone_interval))
    return [name for name in names(root) if name != "latest"]


def test_retention_keeps_the_last_and_the_milestones(tmp_path):
    publish(tmp_path, 10, 20, 30, 40, 50)
    assert len(retire(tmp_path, 0)) == 5
    assert retire(tmp_path, 2, 20) == [f"step_00000{n}" for n in (20, 40, 50)]
    assert retire(tmp_path, 1) == ["step_0000050"]


def test_retention_after_going_back(tmp_path):
    publish(tmp_path, 10, 20, 30)
    (tmp_path / "latest").write_text("step_0000020\n")
    assert retire(tmp_path, 1) == ["step_0000020", "step_0000030"]
    (tmp_path / "latest").unlink()
    assert len(retire(tmp_path, 1)) == 2


def test_retention_spares_what_is_being_read(tmp_path):
    publish(tmp_path, 1, 2)
    with folder.reading(tmp_path / "step_0000001"):
        assert len(retire(tmp_path, 1)) == 2
        assert verify(tmp_path / "step_0000001").step == 1
    # A reader that was killed, here and on another machine, long ago and lately.
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    host = os.uname().nodename
    (tmp_path / "step_0000001" / f".reading-{host}-{int(gone.stdout)}").touch()
    elsewhere = tmp_path / "step_0000001" / ".reading-node-7-4242"
    elsewhere.touch()
    assert len(retire(tmp_path, 1)) == 2
    os.utime(elsewhere, (0, time.time() - 2 * 86400))
    assert retire(tmp_path, 1) == ["step_0000002"]


def test_a_step_published_again_replaces_the_old_one(tmp_path):
    publish(tmp_path, 1, 2)
    (tmp_path / "latest").write_text("step_0000001\n")
    (tmp_path / "step_0000002" / "old").touch()
    path, replaced = folder.publish(write(folder.begin(tmp_path, 2), 2))
    assert replaced is not None and (replaced / "old").exists()
    assert not (path / "old").exists()
    assert folder.read_latest(tmp_path) == "step_0000002"


def damage_missing(path: Path) -> None:
    (path / "__1_0.distcp").unlink()


def damage_truncated(path: Path) -> None:
    os.truncate(path / "__0_0.distcp", 3)


def damage_index(path: Path) -> None:
    (path / METADATA).write_bytes(b"xedni")


def damage_common(path: Path) -> None:
    content = (path / "__0_0.distcp").read_bytes()
    (path / "__0_0.distcp").write_bytes(content[:-6] + b"nommoc")


def damage_manifest(path: Path) -> None:
    (path / FILE_NAME).write_text('{"step": 2')


def damage_no_manifest(path: Path) -> None:
    (path / FILE_NAME).unlink()


def damage_field(path: Path) -> None:
    content = json.loads((path / FILE_NAME).read_text())
    del content["parameters"]
    (path / FILE_NAME).write_text(json.dumps(content))


DAMAGES = {
    damage_missing: "__1_0.distcp is missing",
    damage_truncated: "__0_0.distcp has 3 bytes, 76 were written",
    damage_index: ".metadata has changed since it was written",
    damage_common: "the common state in __0_0.distcp has changed",
    damage_manifest: "its manifest.json cannot be read",
    damage_no_manifest: "it has no manifest.json",
    damage_field: "its manifest.json lacks something",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named_and_the_one_before_is_taken(tmp_path, damage):
    publish(tmp_path, 1, 2)
    damage(tmp_path / "step_0000002")
    with pytest.raises(CorruptCheckpoint, match=re.escape(DAMAGES[damage])):
        verify(tmp_path / "step_0000002")

    found = folder.find_latest(tmp_path)
    assert found is not None and found.path.name == "step_0000001"
    assert DAMAGES[damage] in found.notices[0] and "trying the one before it" in found.notices[0]
    assert found.notices[1].startswith("going on from ")

    with pytest.raises(UserError, match=f"step_0000002 is corrupt: .*{re.escape(DAMAGES[damage])}"):
        folder.find_named(tmp_path / "step_0000002")
    damage(tmp_path / "step_0000001")
    with pytest.raises(UserError, match="holds no good checkpoint: restore one, or"):
        folder.find_latest(tmp_path)


def test_unchecked_believes_the_manifest(tmp_path):
    publish(tmp_path, 1)
    damage_missing(tmp_path / "step_0000001")
    found = folder.find_latest(tmp_path, check=False)
    assert found is not None and found.manifest.step == 1


def test_latest_is_the_authority(tmp_path):
    publish(tmp_path, 1, 2, 3)
    (tmp_path / "latest").write_text("step_0000002\n")
    found = folder.find_latest(tmp_path)
    assert found is not None and found.path.name == "step_0000002" and not found.notices


@pytest.mark.parametrize("content", [None, "", "step_", "\0\xff", "step_0000009\n"])
def test_latest_lost_or_wrong(tmp_path, content):
    publish(tmp_path, 1, 2)
    (tmp_path / "latest").unlink()
    if content is not None:
        (tmp_path / "latest").write_text(content)
    found = folder.find_latest(tmp_path)
    assert found is not None and found.path.name == "step_0000002"
    assert "latest" in found.notices[0]


def test_a_newer_format_is_refused(tmp_path):
    publish(tmp_path, 1)
    file = tmp_path / "step_0000001" / FILE_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2, "new": 1}))
    with pytest.raises(UserError, match="has format 2, this version reads up to 1"):
        read_manifest(tmp_path / "step_0000001")


def test_loading_by_name(tmp_path):
    publish(tmp_path, 1, 2)
    assert folder.find_named(tmp_path).path.name == "step_0000002"
    assert folder.find_named(tmp_path / "step_0000001").manifest.step == 1
    moved = (tmp_path / "step_0000001").rename(tmp_path / "best")
    assert folder.find_named(moved).manifest.step == 1


def test_loading_what_is_none_of_ours(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint .*absent"):
        folder.find_named(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no checkpoint of Samba-Megatron"):
        folder.find_named(tmp_path)
    (tmp_path / METADATA).touch()
    with pytest.raises(UserError, match="is a sharded checkpoint, but not one that Samba-Megatron"):
        folder.find_named(tmp_path)
    with pytest.raises(UserError, match="was never finished"):
        folder.find_named(folder.begin(tmp_path, 1))


def test_disk_preflight(tmp_path):
    folder.require_space(tmp_path / "new", 1)
    assert names(tmp_path / "new") == []
    with pytest.raises(UserError, match=r"needs 1000000000\.00 GB but .* has [\d.]+ GB free"):
        folder.require_space(tmp_path, 10**18)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to .*file/below"):
        folder.require_space(tmp_path / "file" / "below", 1)


def test_a_kill_during_deletion_leaves_no_checkpoint(tmp_path):
    """The first thing that deletion does is take the name away; the last files may remain."""
    publish(tmp_path, 1, 2)
    (aside,) = folder.retire(tmp_path, 1, None)
    (aside / "__0_0.distcp").unlink()
    assert [path.name for _, path in folder.list_checkpoints(tmp_path)] == ["step_0000002"]
    with pytest.raises(UserError, match="was never finished"):
        folder.find_named(aside)
    folder.clean(tmp_path)
    assert names(tmp_path) == ["latest", "step_0000002"]


def test_a_kill_at_any_moment_leaves_a_good_latest(tmp_path):
    """A run that does nothing but publish and retire is killed, cleaned after and started again."""
    began = time.monotonic()
    publish(tmp_path, 1)
    usual = time.monotonic() - began
    moments, last = random.Random(7), 1
    for _ in range(25):
        run = os.fork()
        if run == 0:
            for step in range(last + 1, last + 1000):
                publish(tmp_path, step)
                folder.remove(*folder.retire(tmp_path, 2, None))
        time.sleep(moments.uniform(0.0, max(0.1, 4 * usual)))
        os.kill(run, signal.SIGKILL)
        os.waitpid(run, 0)

        found = folder.find_latest(tmp_path)
        assert found is not None and found.notices == []
        assert found.manifest.step >= last
        last = found.manifest.step
        folder.clean(tmp_path)
        for _, path in folder.list_checkpoints(tmp_path):
            verify(path)
    assert last > 5
