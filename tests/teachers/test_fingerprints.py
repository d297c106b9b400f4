"""Fingerprints that caches, run folders and partial evaluations of earlier versions hold."""

import os
from types import SimpleNamespace

import pytest
import torch

from hpd.config import ModelConfig
from hpd.teachers.fingerprints import (
    model_fingerprint,
    quick_fingerprint,
    teacher_fingerprint,
    tokenizer_fingerprint,
    tokenizer_hash,
)

TOKENIZER = SimpleNamespace(
    get_vocab=lambda: {"é": 1, "a": 0}, eos_token="a", bos_token=None, chat_template=None
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    os.utime(tmp_path / "config.json", ns=(10, 10))
    os.utime(tmp_path / "model.safetensors", ns=(20, 20))
    return tmp_path


def test_of_a_folder(folder):
    assert teacher_fingerprint(ModelConfig(model=str(folder))) == {
        "weights": "e8ab45b5866d3b18847110865fe186f8",
        "dtype": "float32",
        "quantization": None,
    }
    assert quick_fingerprint(str(folder), "auto") == "4b52ead556dfecc0"


def test_of_a_loaded_model():
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
        model.bias.zero_()
    assert model_fingerprint(model) == "fec4ce3ee87e3937b63445794d3d5185"


def test_of_a_tokenizer():
    assert tokenizer_hash(TOKENIZER) == "78206b8ca2ed6374dccfa50cf9be66c6"
    args = SimpleNamespace(
        eos_token=None, chat_template_path=None, max_length=8, truncation_mode="keep_start"
    )
    assert tokenizer_fingerprint(TOKENIZER, args) == {
        "tokenizer": "50a595ca7cbf16b89d2581108f0e81de",
        "chat template": "accf1c88b44fc8322b13ff52cec4ba87",
        "max_length": 8,
        "truncation_mode": "keep_start",
    }
