"""Converts checkpoints to Hugging Face format and back, rewrites them, and says what they hold.

    convert_checkpoint.py to-hf --checkpoint runs/samba/checkpoints --output samba-hf
    convert_checkpoint.py from-hf --input samba-hf --output imported
    convert_checkpoint.py reshard --checkpoint runs/samba/checkpoints --output few --weights-only
    convert_checkpoint.py inspect --checkpoint runs/samba/checkpoints

On a CPU, whatever the layout that a checkpoint was saved in, one tensor in memory at a time.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from samba_megatron.config.units import parse_bytes
from samba_megatron.platform.errors import UserError, run_command


def main() -> None:
    """Runs the command."""
    arguments = _parse()
    arguments.run(arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    to_hf = commands.add_parser("to-hf", help="checkpoint → Hugging Face folder, with parity check")
    _add_checkpoint(to_hf)
    to_hf.add_argument("--output", type=Path, required=True, help="folder to make")
    to_hf.add_argument("--overwrite", action="store_true", help="replace an earlier export there")
    to_hf.add_argument("--dtype", choices=("bf16", "fp32"), help="default: as trained")
    to_hf.add_argument("--shard-size", default="5GB", help="largest file (default: 5GB)")
    to_hf.add_argument("--tokenizer", type=Path, help="default: the one the checkpoint names")
    to_hf.add_argument(
        "--parity",
        choices=("logits", "tensors"),
        default="logits",
        help="tensors: compare the files only, where a whole model does not fit in memory",
    )
    to_hf.set_defaults(run=_to_hf)
    from_hf = commands.add_parser("from-hf", help="Hugging Face folder → checkpoint of weights")
    from_hf.add_argument("--input", type=Path, required=True, help="folder with config.json")
    from_hf.add_argument("--output", type=Path, required=True, help="folder to make")
    from_hf.set_defaults(run=_from_hf)
    reshard = commands.add_parser(
        "reshard", help="checkpoint → checkpoint in few files; weights only, another dtype"
    )
    _add_checkpoint(reshard)
    reshard.add_argument("--output", type=Path, required=True, help="folder to make")
    reshard.add_argument(
        "--weights-only", action="store_true", help="without optimizer and random generators"
    )
    reshard.add_argument("--dtype", choices=("bf16", "fp32"), help="of the weights (as they are)")
    reshard.add_argument("--file-size", default="5GB", help="largest file (default: 5GB)")
    reshard.set_defaults(run=_reshard)
    inspect = commands.add_parser("inspect", help="what a checkpoint holds")
    _add_checkpoint(inspect)
    inspect.set_defaults(run=_inspect)
    return parser.parse_args()


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="a checkpoint, or a folder of checkpoints (its latest is taken)",
    )


def _to_hf(arguments: argparse.Namespace) -> None:
    from samba_megatron.checkpoint.huggingface.export import ExportOptions, export

    report = export(
        ExportOptions(
            checkpoint=arguments.checkpoint,
            output=arguments.output,
            overwrite=arguments.overwrite,
            dtype=arguments.dtype,
            shard_bytes=parse_bytes("--shard-size", arguments.shard_size),
            tokenizer=arguments.tokenizer,
            compare=arguments.parity,
        ),
        notice=_notice,
    )
    print(
        f"{report.output}: {report.bytes / 1e9:.2f} GB of weights converted in "
        f"{report.seconds:.1f} s, memory at most {report.peak_bytes / 1e9:.2f} GB"
    )


def _from_hf(arguments: argparse.Namespace) -> None:
    from samba_megatron.checkpoint.huggingface.importing import import_model

    report = import_model(arguments.input, arguments.output, _notice)
    model = report.config.model
    print(
        f"{report.path}: {report.parameters:,} parameters, {model.hybrid_layer_pattern}, "
        f"written in {report.seconds:.1f} s"
    )
    _say_how_to_start(arguments.output)


def _reshard(arguments: argparse.Namespace) -> None:
    file_bytes = parse_bytes("--file-size", arguments.file_size)
    import torch

    from samba_megatron.checkpoint.reshard import ReshardOptions, reshard

    dtypes = {None: None, "bf16": torch.bfloat16, "fp32": torch.float32}
    report = reshard(
        ReshardOptions(
            checkpoint=arguments.checkpoint,
            output=arguments.output,
            weights_only=arguments.weights_only,
            dtype=dtypes[arguments.dtype],
            file_bytes=file_bytes,
        ),
        notice=_notice,
    )
    plural = "" if report.files == 1 else "s"
    print(
        f"{report.path}: {report.files} file{plural} of {report.bytes / 1e9:.2f} GB (from "
        f"{report.source_files} of {report.source_bytes / 1e9:.2f} GB), all {report.pieces:,} "
        f"pieces compared, {report.seconds:.1f} s"
    )
    if arguments.weights_only:
        _say_how_to_start(arguments.output)


def _say_how_to_start(output: Path) -> None:
    print(f"start from it with --checkpoint.load {output} --checkpoint.load_weights_only true")


def _inspect(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from samba_megatron.checkpoint.inspect import inspect

    content = inspect(arguments.checkpoint)
    table = Table(title=content["path"], show_header=False, title_justify="left")
    for name, value in _summary(content).items():
        table.add_row(name, value)
    console = Console()
    console.print(table)
    for key, entry in content["weights"].items():
        shape = "×".join(map(str, entry["shape"]))
        console.print(f"{key}  {shape}  {entry['dtype']}", markup=False, highlight=False)
    if content["problem"]:
        raise UserError(f"checkpoint {content['path']} is corrupt: {content['problem']}")


def _summary(content: dict[str, Any]) -> dict[str, str]:
    manifest = content["manifest"]
    weights, optimizer = content["weights"].values(), content["optimizer"].values()
    dtypes = sorted({entry["dtype"] for entry in weights})
    layout = ", ".join(f"{k} {v}" for k, v in manifest["layout"].items() if v is not None)
    config = manifest["config"]
    return {
        "step": f"{manifest['step']:,}",
        "tokens": f"{manifest['consumed_tokens']:,}",
        "parameters": f"{manifest['parameters']:,}",
        "model": _fields(config.get("model", {})),
        "training": _fields(_training(config)),
        "saved in the layout": layout,
        "dtype": ", ".join(dtypes),
        "weights": f"{sum(entry['bytes'] for entry in weights) / 1e9:.3f} GB",
        "optimizer": f"{sum(entry['bytes'] for entry in optimizer) / 1e9:.3f} GB",
        "on disk": f"{sum(manifest['files'].values()) / 1e9:.3f} GB",
        "saved": manifest["created"],
        "software": ", ".join(f"{k} {v}" for k, v in manifest["versions"].items()),
    }


def _training(config: dict[str, Any]) -> dict[str, Any]:
    """What of a run's configuration is asked for most."""
    groups = {
        "data": ("sequence_length", "tokenizer"),
        "training": ("global_batch_size",),
        "optimizer": ("lr",),
        "precision": ("params_dtype", "fp8"),
    }
    return {
        f"{group}.{name}": config[group][name]
        for group, names in groups.items()
        for name in names
        if name in config.get(group, {})
    }


def _fields(fields: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in fields.items() if value is not None)


def _notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
