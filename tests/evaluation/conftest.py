"""A small model with a tokenizer, as a checkpoint and as an export, once a session."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from samba_megatron.checkpoint.huggingface import companions
from samba_megatron.checkpoint.huggingface.fields import to_fields
from samba_megatron.checkpoint.huggingface.importing import import_model
from samba_megatron.checkpoint.huggingface.shipped.configuration_samba import SambaHybridConfig
from samba_megatron.checkpoint.huggingface.shipped.modeling_samba import SambaHybridForCausalLM
from samba_megatron.config import ModelConfig
from samba_megatron.data.corpus import gather_corpus
from samba_megatron.data.jsonl import read_texts
from samba_megatron.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from samba_megatron.evaluation.subject import Subject, load_subject

VOCABULARY = 400
MODEL = ModelConfig(
    hybrid_layer_pattern="M-*-M-F-",
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    window_size=24,
    vocab_size=VOCABULARY,
)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines of some Python modules."""
    folder = tmp_path_factory.mktemp("text")
    gather_corpus(folder, source=Path(asyncio.__file__).parent)
    return folder / "train.jsonl"


@pytest.fixture(scope="session")
def tokenizer(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of 400 tokens, each digit one of them."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(read_texts([text], "text"), VOCABULARY, folder, False, split_digits=True)
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def exported(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with every kind of layer and weights of chance, in Hugging Face format."""
    torch.manual_seed(1)
    ids = {"eos_token_id": tokenizer.eod, "bos_token_id": None, "pad_token_id": None}
    fields = to_fields(MODEL, 64, ids)
    folder = tmp_path_factory.mktemp("export") / "small"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    kept = {name: value for name, value in fields.items() if name not in ("model_type", "auto_map")}
    model = SambaHybridForCausalLM(SambaHybridConfig(**kept))
    tensors = {n: t.clone() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    companions.copy_code(folder)
    shutil.copytree(tokenizer.path.parent, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def checkpoint(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints with the same model."""
    folder = tmp_path_factory.mktemp("checkpoints") / "imported"
    import_model(exported, folder, lambda text: None)
    return folder


@pytest.fixture(scope="session")
def subject(checkpoint: Path, tokenizer: Tokenizer) -> Subject:
    """The model, loaded from the checkpoint."""
    return load_subject(checkpoint, tokenizer.path.parent, "cpu", "auto")
