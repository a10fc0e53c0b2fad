"""What lies beside the weights of an export: tokenizer, generation config, model card, code."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samba_megatron.checkpoint.huggingface.source import CheckpointSource
from samba_megatron.config.pattern import layer_symbols
from samba_megatron.model.layers import KINDS
from samba_megatron.platform.errors import UserError

if TYPE_CHECKING:
    from samba_megatron.data.tokenizer import Tokenizer

SHIPPED = (
    "configuration_samba.py",
    "modeling_samba.py",
    "cache_samba.py",
    "operations_samba.py",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""What a tokenizer's folder may hold."""


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer that goes with an export."""

    tokenizer: "Tokenizer | None"
    """None: the checkpoint does not know one and none was given."""
    ids: dict[str, int | None]
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id``."""

    def copy_to(self, target: Path) -> None:
        """Copies the folder's files; a tokenizer of another kind of file is written as a folder."""
        if self.tokenizer is None:
            return
        path = self.tokenizer.path
        if path.name != "tokenizer.json":
            self.tokenizer.save(target)
            return
        for name in TOKENIZER_FILES:
            if (path.parent / name).is_file():
                shutil.copyfile(path.parent / name, target / name)


def find_tokenizer(source: CheckpointSource, given: Path | None) -> TokenizerFiles:
    """The tokenizer of ``given``, or that which the training data were made with.

    Raises:
        UserError: it cannot be read, does not fit the model, or is not the one of the data.
    """
    from samba_megatron.data.tokenizer import load_tokenizer

    recorded = source.config.data.tokenizer
    if given is None and recorded is None:
        return TokenizerFiles(None, dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")))
    folder = Path(given or str(recorded))
    if given is None and not folder.exists():
        raise UserError(
            f"the tokenizer {folder} that the checkpoint was trained with is not there: say where "
            "it is now with --tokenizer"
        )
    tokenizer = load_tokenizer(folder)
    vocab_size = source.config.model.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer {folder} has {tokenizer.vocab_size} tokens and the model's vocabulary "
            f"{vocab_size}: give the tokenizer that the training data were made with"
        )
    identity = source.manifest.data_identity.get("tokenizer")
    if identity not in (None, tokenizer.identity):
        raise UserError(
            f"the tokenizer {folder} is not the one that the model was trained with (its "
            f"{tokenizer.path.name} has the SHA-256 {tokenizer.identity[:12]}…, that one's was "
            f"{identity[:12]}…): give that one with --tokenizer"
        )
    special = {name: _special(tokenizer, name) for name in ("bos", "pad")}
    return TokenizerFiles(
        tokenizer,
        {
            "bos_token_id": special["bos"],
            "eos_token_id": tokenizer.eod,
            "pad_token_id": special["pad"],
        },
    )


def _special(tokenizer: "Tokenizer", name: str) -> int | None:
    """Id of the token that ``tokenizer_config.json`` names as bos or pad."""
    file = tokenizer.path.with_name("tokenizer_config.json")
    if tokenizer.path.name != "tokenizer.json" or not file.is_file():
        return None
    named = json.loads(file.read_text(encoding="utf-8")).get(f"{name}_token")
    token = named.get("content") if isinstance(named, dict) else named
    number: int | None = None if token is None else tokenizer.backend.token_to_id(token)
    return number


def generation_config(ids: dict[str, int | None]) -> dict[str, Any]:
    """The content of ``generation_config.json``."""
    known = {name: value for name, value in ids.items() if value is not None}
    return {"_from_model_config": False, "use_cache": True, **known}


def copy_code(target: Path) -> None:
    """Copies the code that transformers loads with ``trust_remote_code=True``."""
    for name in SHIPPED:
        shutil.copyfile(Path(__file__).parent / "shipped" / name, target / name)


def model_card(source: CheckpointSource, dtype: str, beyond: list[str]) -> str:
    """README.md of an export: what was trained, on how much, how; the license is the user's."""
    config, manifest = source.config, source.manifest
    model = config.model
    symbols = layer_symbols(model.hybrid_layer_pattern)
    counts = {KINDS[s].name: symbols.count(s) for s in dict.fromkeys(symbols)}
    facts = {
        "parameters": f"{manifest.parameters:,}",
        "layers": f"`{model.hybrid_layer_pattern}` "
        + "("
        + ", ".join(f"{count} {name}" for name, count in counts.items())
        + ")",
        "width": str(model.hidden_size),
        "MLP width": str(model.ffn_hidden_size),
        "attention": f"{model.num_attention_heads} heads, {model.kv_heads} key/value heads of "
        f"{model.head_dim}, window {model.window_size or 'none'}",
        "vocabulary": f"{model.vocab_size:,}",
        "weights": dtype,
        "training tokens": f"{manifest.consumed_tokens:,}",
        "training steps": f"{manifest.step:,}",
        "batch": f"{config.training.global_batch_size} sequences of {config.data.sequence_length}",
        "peak learning rate": f"{config.optimizer.lr:g}",
        "checkpoint saved": manifest.created,
        "software": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    lines = [
        *("---", "library_name: transformers", "pipeline_tag: text-generation"),
        *("tags: [samba, mamba, sliding-window-attention]", "# license: (yours to choose)", "---"),
        *(f"# {config.name}", ""),
        "A Samba language model (arXiv 2406.07522): Mamba-1 and sliding-window attention.",
        *("", "| | |", "|---|---|"),
        *(f"| {name} | {value} |" for name, value in facts.items()),
        *("", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""),
        'model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)',
        *('tokenizer = AutoTokenizer.from_pretrained("PATH")', "```", ""),
        _who_loads_it(beyond),
        "",
        "`parity.json` says how the weights and logits of this folder were compared with the "
        "checkpoint they come from.",
    ]
    return "\n".join(lines) + "\n"


def _who_loads_it(beyond: list[str]) -> str:
    if beyond:
        return (
            "The code in this folder is needed to load it; flash-linear-attention's Samba cannot "
            f"express it ({', '.join(beyond)})."
        )
    return (
        "With flash-linear-attention imported, its Samba class loads this folder; without it, the "
        "code in this folder does."
    )
