"""A recipe that a CPU measures in moments."""

from pathlib import Path

import pytest
import yaml


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """Every kind of layer that samba has."""
    sizes = {
        "hybrid_layer_pattern": "M-*-",
        "hidden_size": 32,
        "ffn_hidden_size": 256,
        "num_attention_heads": 4,
        "window_size": 8,
        "vocab_size": 64,
    }
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump({"name": "toy", "model": sizes}))
    return str(path)
