"""submit.py without a cluster: what it prints, and one sentence for each mistake."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from samba_megatron.data.tokenizer import train_tokenizer
from samba_megatron.platform.errors import UserError
from slurm.checks import seconds_of
from slurm.submit import main
from tests.distributed.toy import write_dataset


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data"))


class Result(NamedTuple):
    """What the command did."""

    mistake: str
    """The sentence that it ended with; empty if it ended well."""
    output: str


Submit = Callable[..., Result]


@pytest.fixture
def submit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Submit:
    """The command, where none of Slurm's is found."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def run(options: dict[str, Any], *switches: str, site: dict[str, Any] | None = None) -> Result:
        file = tmp_path / "site.yaml"
        file.write_text(yaml.safe_dump({"shared_paths": ["/"], **(site or {})}))
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["submit.py", "--site", str(file), *switches, *words])
        mistake = ""
        try:
            main()
        except UserError as error:
            mistake = str(error)
        return Result(mistake, capsys.readouterr().out)

    return run


def options_of(tmp_path: Path, prefix: str, **changes: Any) -> dict[str, Any]:
    """A good command line, changed; names have _ for -."""
    options: dict[str, Any] = {
        "config": "samba_tiny",
        "nodes": 2,
        "gpus-per-node": 2,
        "time": "24:00:00",
        "run-dir": tmp_path / "run",
        "data.data_path": prefix,
        "data.split": "98,2,0",
    }
    return options | changes


def test_dry_run_shows_everything_and_does_nothing(
    submit: Submit, tmp_path: Path, prefix: str
) -> None:
    options = options_of(tmp_path, prefix, account="me", **{"until-tokens": "2M"})
    result = submit(options, "--dry-run")
    assert not result.mistake
    for words in (
        "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=2\n#SBATCH --gpus-per-node=2\n",
        "#SBATCH --exclusive\n",
        "#SBATCH --account=me\n",
        "#SBATCH --signal=USR1@600\n",
        "#SBATCH --requeue\n",
        "train_tokens: 2000000",
        "launch check nodes -m samba_megatron.platform.preflight",
        f"touch {tmp_path}/run/stop",
    ):
        assert words in result.output, (words, result.output)
    assert "{{" not in result.output.replace("{{ }}", "")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        ({"kind": "pyxis", "image": "/i.sqsh"}, ["--container-image=/i.sqsh", "PYTHON=(python)"]),
        (
            {"kind": "apptainer", "image": "/i.sif", "mounts": ["/data"]},
            ["apptainer exec --nv", "--bind /data:/data", "/i.sif python"],
        ),
        ({"kind": "virtualenv", "virtualenv": "/env"}, ["export PATH=/env/bin:$PATH"]),
    ],
)
def test_containers(
    submit: Submit, tmp_path: Path, prefix: str, runtime: dict[str, Any], words: list[str]
) -> None:
    site = {"runtime": runtime, "modules": ["cuda/13"], "environment": {"NCCL_DEBUG": "WARN"}}
    result = submit(options_of(tmp_path, prefix), "--dry-run", site=site)
    assert not result.mistake
    for text in [*words, "module load cuda/13", "export NCCL_DEBUG=WARN"]:
        assert text in result.output, (text, result.output)
    script = result.output.partition(".sbatch\n")[2].partition("# ---")[0]
    checked = subprocess.run(["/bin/bash", "-n"], input=script, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no Slurm": ({}, ["no sbatch on this machine", "--dry-run"]),
    "recipe": ({"config": "samba_tinny"}, ["samba_tinny", "samba_tiny"]),
    "field": ({"model.hiden_size": 3}, ["hiden_size", "model.hidden_size"]),
    "time": ({"time": "24h"}, ["24h", "24:00:00"]),
    "short time": ({"time": "5"}, ["--time 5", "10 minutes", "--signal-minutes"]),
    "nodes": ({"nodes": 0}, ["--nodes is 0"]),
    "tokens": ({"until-tokens": "2 tons"}, ["2 tons", "20B"]),
    "layout": ({"parallel.pipeline_model_parallel_size": 3}, ["pipeline_model_parallel_size 3"]),
    "over nodes": (
        {"parallel.tensor_model_parallel_size": 4},
        ["tensor_model_parallel_size 4", "cross nodes"],
    ),
    "batch": ({"training.global_batch_size": 7}, ["global_batch_size 7"]),
    "data": ({"data.data_path": "/nowhere/text"}, ["/nowhere/text.bin", "data.data_path"]),
    "container": ({"container": "i.sqsh"}, ["--container i.sqsh", "runtime.kind"]),
    "chain": ({"chain": 0}, ["--chain is 0"]),
    "disk": ({"model.hidden_size": 2**20}, ["GB are free", "checkpoint.keep_last"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(submit: Submit, tmp_path: Path, prefix: str, name: str) -> None:
    changes, words = MISTAKES[name]
    result = submit(options_of(tmp_path, prefix, **changes))
    assert result.mistake and "\n" not in result.mistake
    assert all(word in result.mistake for word in words), result.mistake
    assert not (tmp_path / "run").exists()


def test_a_folder_of_one_machine_is_refused(submit: Submit, tmp_path: Path, prefix: str) -> None:
    """/tmp, unless the site says that its nodes share it; and what is not where the site says."""
    options = options_of(tmp_path, prefix, **{"run-dir": "/tmp/run"})
    result = submit(options, "--dry-run", site={"shared_paths": []})
    assert "on this machine only" in result.mistake
    result = submit(options, "--dry-run", site={"shared_paths": ["/scratch"]})
    assert "not under /scratch" in result.mistake


def test_a_gpu_that_is_too_small_is_refused(submit: Submit, tmp_path: Path, prefix: str) -> None:
    options = options_of(tmp_path, prefix)
    result = submit(options, "--dry-run", site={"gpu_memory_gib": 0.01})
    assert "GiB and the site's have 0.01" in result.mistake
    assert "memory: the fullest GPU needs" in submit(options, "--dry-run").output


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("24:00:00", 86400),
        ("2-12", 216000),
        ("1-00:30", 88200),
        ("1-00:00:05", 86405),
    ],
)
def test_times(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "-5", "1.5", "infinite"])
def test_no_times(text: str) -> None:
    with pytest.raises(UserError, match="--time"):
        seconds_of(text)


def write_blend(folder: Path, prefix: str) -> Path:
    folder.mkdir()
    path = folder / "blend.yaml"
    path.write_text(f"sources:\n  - prefix: {os.path.relpath(prefix, folder)}\n")
    return path


def test_blend_files_are_read_and_all_paths_are_whole(
    submit: Submit, tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative to where the user is, and not to where the job starts."""
    blend = write_blend(tmp_path / "blends", prefix)
    (tmp_path / "start").mkdir()
    monkeypatch.chdir(tmp_path)
    options = options_of(tmp_path, prefix)
    del options["data.data_path"]
    options |= {
        "data.blend_file": "[blends/blend.yaml]",
        "data.valid_data_path": "[blends/blend.yaml]",
        "checkpoint.load": "start",
    }
    result = submit(options, "--dry-run")
    assert not result.mistake
    assert result.output.count(f"- {blend}\n") == 2
    assert f"load: {tmp_path}/start\n" in result.output


@pytest.mark.parametrize("name", ["data.blend_file", "data.valid_data_path"])
def test_a_blend_file_that_names_nothing_is_refused(
    submit: Submit, tmp_path: Path, prefix: str, name: str
) -> None:
    blend = write_blend(tmp_path / "blends", "/nowhere/text")
    options = options_of(tmp_path, prefix, **{name: f"[{blend}]"})
    if name == "data.blend_file":
        del options["data.data_path"]
    mistake = submit(options, "--dry-run").mistake
    assert f"{blend} names" in mistake and "nowhere/text.bin, which is not there" in mistake
    options[name] = f"[{tmp_path}/none.yaml]"
    assert f"{tmp_path}/none.yaml" in submit(options, "--dry-run").mistake


def test_the_prefix_of_a_corpus_in_shards_leads_to_its_blend_file(
    submit: Submit, tmp_path: Path, prefix: str
) -> None:
    blend = write_blend(tmp_path / "blends", prefix)
    corpus = tmp_path / "blends" / "all"
    blend.rename(f"{corpus}.blend.yaml")
    options = options_of(tmp_path, prefix, **{"data.data_path": corpus})
    assert "check the path" in submit(options, "--dry-run").mistake, "of one dataset, which is lost"
    Path(f"{corpus}_00000.idx").touch()
    mistake = submit(options, "--dry-run").mistake
    assert f"give its blend file {corpus}.blend.yaml (a run takes it in data.blend_file" in mistake


def test_a_run_without_a_tokenizer_is_told_what_its_exports_will_lack(
    submit: Submit, tmp_path: Path, prefix: str
) -> None:
    note = "note: data.tokenizer is not named"
    assert note in submit(options_of(tmp_path, prefix), "--dry-run").output
    train_tokenizer(["some text"], 260, tmp_path / "tokenizer", show_progress=False)
    options = options_of(tmp_path, prefix, **{"data.tokenizer": tmp_path / "tokenizer"})
    result = submit(options, "--dry-run")
    assert not result.mistake and note not in result.output
