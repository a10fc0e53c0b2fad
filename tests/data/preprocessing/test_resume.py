"""Killed at any moment, the same command goes on and makes the same bytes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from samba_megatron.data.jsonl import read_texts
from samba_megatron.data.manifest import read_manifest
from samba_megatron.data.preprocessing.options import PreprocessOptions
from samba_megatron.data.preprocessing.run import preprocess
from samba_megatron.data.preprocessing.workspace import Workspace, release_claims
from samba_megatron.data.tokenizer import load_tokenizer
from samba_megatron.platform.errors import UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def source(corpus, tmp_path_factory) -> Path:
    """24 MB of real text: eight times the corpus."""
    path = tmp_path_factory.mktemp("source") / "text.jsonl"
    path.write_bytes((corpus / "train.jsonl").read_bytes() * 8)
    return path


@pytest.fixture(scope="module")
def options(source, tokenizer_folder, tmp_path_factory) -> PreprocessOptions:
    prefix = tmp_path_factory.mktemp("whole") / "out" / "text"
    return PreprocessOptions(
        [str(source)], str(tokenizer_folder), str(prefix), workers=2, shard_bytes=2 << 20
    )


@pytest.fixture(scope="module")
def uninterrupted(options) -> dict[str, bytes]:
    """The files of a run that nothing stopped."""
    assert preprocess(options).shards == 12
    return files_of(Path(options.output_prefix))


def files_of(prefix: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in prefix.parent.iterdir()
        if path.suffix in (".bin", ".idx", ".yaml")
    }


def command(options: PreprocessOptions) -> list[str]:
    tool = str(ROOT / "tools" / "preprocess_corpus.py")
    arguments = ["--input", *options.inputs, "--tokenizer", options.tokenizer, "--workers", "2"]
    prefix = ["--output-prefix", options.output_prefix, "--shard-size", str((2 << 20) / 1e6)]
    # The slower engine, so that there is time to stop it in the middle.
    return [sys.executable, tool, *arguments, *prefix, "--engine", "huggingface"]


def children_of(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def test_kill_9_at_any_moment_loses_at_most_the_shards_in_flight(options, uninterrupted, tmp_path):
    mine = replace(options, output_prefix=str(tmp_path / "out" / "text"))
    workspace, rng = Workspace(mine.output_prefix), random.Random(time.time_ns())
    kills, done = 0, 0
    while kills < 3:
        process = subprocess.Popen(command(mine), stdout=subprocess.DEVNULL)
        until = done + rng.randint(1, 2)
        while process.poll() is None and len(finished(workspace)) < until:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        workers = children_of(process.pid)
        process.kill()
        if process.wait() == 0 or (done and not workspace.folder.exists()):
            break  # it had ended
        kills += 1
        assert all(gone(worker) for worker in workers)
        now = len(finished(workspace))
        assert now >= done
        done = now
    result = subprocess.run(command(mine), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert kills and done
    if "is up to date" not in result.stdout:  # it may have ended before the last kill
        assert "of these done before" in result.stdout
    assert files_of(Path(mine.output_prefix)) == uninterrupted
    assert not workspace.folder.exists()
    assert [p.name for p in tmp_path.glob("out/.*")] == []


def finished(workspace: Workspace) -> list[str]:
    folder = workspace.folder / "shards"
    return [path.name for path in folder.glob("*.json")] if folder.exists() else []


def gone(pid: int) -> bool:
    """Whether a worker ended with the command that was killed."""
    for _ in range(3000):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.01)
    return False


@pytest.fixture(scope="module")
def stopped_once(options, source, tmp_path_factory) -> PreprocessOptions:
    """A run that failed at a bad line near its end, with shards finished before it."""
    folder = tmp_path_factory.mktemp("stopped")
    broken = folder / "text.jsonl"
    broken.write_bytes(source.read_bytes() + b'{"text": \n')
    prefix = str(folder / "out" / "text")
    mine = replace(options, inputs=[str(broken)], output_prefix=prefix, workers=1)
    with pytest.raises(UserError, match="malformed JSON"):
        preprocess(mine)
    assert len(finished(Workspace(prefix))) == 11
    return mine


@pytest.fixture
def stopped(stopped_once, tmp_path) -> PreprocessOptions:
    """What that run has left, to go on with."""
    shutil.copytree(Path(stopped_once.output_prefix).parent, tmp_path / "out")
    return replace(stopped_once, output_prefix=str(tmp_path / "out" / "text"))


def test_a_failed_run_goes_on_where_it_stopped_once_told_to_skip(stopped, uninterrupted):
    report = preprocess(replace(stopped, on_error="skip", workers=2))
    assert (report.shards_kept, report.skipped.total()) == (11, 1)
    made = files_of(Path(stopped.output_prefix))
    data = [
        b"".join(v for k, v in sorted(f.items()) if k.endswith("bin"))
        for f in (made, uninterrupted)
    ]
    assert data[0] == data[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"append_eod": False}, "append_eod was True, now False"),
        ({"text_key": "body"}, "text_key was 'text', now 'body'"),
        ({"shard_bytes": 3 << 20}, "shard_bytes was 2097152, now 3145728"),
        ({"validation_fraction": 0.1}, "validation_fraction was 0.0, now 0.1"),
    ],
)
def test_other_options_are_refused_by_name(stopped, change, message):
    with pytest.raises(UserError, match=f"unfinished run .*{message}.*--overwrite"):
        preprocess(replace(stopped, **change))
    assert len(finished(Workspace(stopped.output_prefix))) == 11


def test_other_inputs_are_refused_by_name(stopped, write_jsonl):
    more = write_jsonl({"text": "more"}, name="more.jsonl")
    with pytest.raises(
        UserError, match="there were 1 inputs, now 2; the input .*more.jsonl is new"
    ):
        preprocess(replace(stopped, inputs=[*stopped.inputs, str(more)]))
    before = os.stat(stopped.inputs[0])
    os.utime(stopped.inputs[0], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    try:
        with pytest.raises(UserError, match=r"the input .*text\.jsonl has changed"):
            preprocess(stopped)
    finally:
        os.utime(stopped.inputs[0], ns=(before.st_atime_ns, before.st_mtime_ns))


def test_another_tokenizer_is_refused(stopped, tokenizer_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tokenizer_folder, other)
    (other / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|padding|>"}))
    with pytest.raises(UserError, match="the tokenizer is another one"):
        preprocess(replace(stopped, tokenizer=str(other)))


def test_a_shard_that_was_damaged_meanwhile_is_done_again(stopped, uninterrupted):
    Path(f"{stopped.output_prefix}_00003.bin").unlink()
    with open(f"{stopped.output_prefix}_00005.idx", "ab") as stream:
        stream.write(b"more")
    report = preprocess(replace(stopped, on_error="skip"))
    assert report.shards_kept == 9


def test_datasets_of_another_run_are_refused_before_they_are_touched(options, tmp_path, corpus):
    prefix = tmp_path / "text"
    (tmp_path / "text_00002.bin").write_bytes(b"precious")
    mine = replace(options, output_prefix=str(prefix))
    with pytest.raises(UserError, match=r"text_00002\.bin exists without a manifest"):
        preprocess(mine)
    assert (tmp_path / "text_00002.bin").read_bytes() == b"precious"


def test_fewer_shards_leave_none_of_the_old_ones(options, uninterrupted, tmp_path):
    mine = replace(options, output_prefix=str(tmp_path / "text"))
    preprocess(mine)
    preprocess(replace(mine, shard_bytes=8 << 20, overwrite=True))
    assert len(list(tmp_path.glob("text_*.bin"))) == 3
    assert len(list(tmp_path.glob("text_*.manifest.json"))) == 3
    preprocess(replace(mine, shard_bytes=None, overwrite=True))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["text.bin", "text.blend.yaml", "text.idx", "text.manifest.json"]


def test_the_held_out_documents_are_the_same_in_any_cut(
    options, tmp_path, tokenizer_folder, source
):
    split = replace(options, validation_fraction=0.1)
    texts = []
    for shard_bytes in (None, 2 << 20):
        prefix = str(tmp_path / str(shard_bytes) / "text")
        mine = replace(split, output_prefix=prefix, shard_bytes=shard_bytes)
        report = preprocess(mine)
        found = {}
        for name in ("text", "text_validation"):
            manifest = read_manifest(Path(prefix).with_name(name))
            assert manifest is not None
            found[name] = b"".join(
                (Path(prefix).parent / f"{entry.name}.bin").read_bytes()
                for entry in manifest.datasets
            )
            assert manifest.counts["tokens"] * 2 == len(found[name])
        texts.append(found)
        assert 0.05 < report.splits["validation"]["documents"] / report.documents < 0.15
        assert preprocess(mine).up_to_date
    assert texts[0] == texts[1]
    documents = len(list(read_texts([source], "text")))
    assert sum(split["documents"] for split in report.splits.values()) == documents
    assert load_tokenizer(tokenizer_folder).vocab_size < 65_500


def test_two_commands_for_one_output_exclude_each_other(stopped):
    workspace = Workspace(stopped.output_prefix)
    workspace.claim()
    try:
        with pytest.raises(UserError, match="another process works for this output"):
            preprocess(replace(stopped, on_error="skip"))
    finally:
        release_claims()
    assert len(finished(workspace)) == 11
    assert preprocess(replace(stopped, on_error="skip")).shards_kept == 11


def test_a_signal_ends_it_and_its_workers(options, tmp_path):
    mine = replace(options, output_prefix=str(tmp_path / "out" / "text"))
    process = subprocess.Popen(
        command(mine),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # A shell starts what is in its background with the signal ignored, and so its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    workspace = Workspace(mine.output_prefix)
    while len(finished(workspace)) < 2 and process.poll() is None:
        time.sleep(0.01)
    workers = children_of(process.pid)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert said.decode().splitlines()[-1] == "interrupted"
    assert all(gone(worker) for worker in workers)
