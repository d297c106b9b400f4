"""DistillKit's rows are read bit for bit as its own reader reads them: distillkit.json is made with it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from hpd.teachers.foreign import Compressor, DistillKitFile
from hpd.teachers.foreign.distillkit import pack_bits, unpack_bits

MADE = json.loads(Path(__file__).with_name("distillkit.json").read_text())


def test_values_and_tokens_are_its_own_readers_to_the_bit():
    assert len(MADE) > 40
    for made in MADE:
        config = Compressor.of(made["config"], "the fixture")
        packed, indices = (
            torch.tensor(made[name], dtype=torch.uint8)
            for name in ("compressed_logprobs", "bytepacked_indices")
        )
        assert packed.shape[1] == config.logprob_bytes
        assert indices.shape[1] == config.index_bytes
        values = config.values(packed)
        assert str(values.dtype) == f"torch.{made['dtype']}"
        assert values.dtype == config.dtype
        assert torch.equal(values.double(), torch.tensor(made["values"], dtype=torch.float64)), made["config"]
        tokens = unpack_bits(indices, config.index_bits, config.k)
        assert tokens.tolist() == made["tokens"]
        assert torch.equal(pack_bits(tokens, config.index_bits), indices)


@pytest.fixture
def rows(tmp_path):
    """A file of one row, next to its configuration."""
    made = MADE[0]
    columns = {name: [made[name]] for name in ("compressed_logprobs", "bytepacked_indices")}
    table = pa.table({"input_ids": [[4, 1, 7, 60, 3, 9]], **columns})
    pq.write_table(table, tmp_path / "data_0.parquet")
    (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(made["config"]))
    return tmp_path


def test_a_folder_is_read_with_the_configuration_next_to_it(rows):
    file = DistillKitFile(str(rows))
    assert len(file) == 1
    assert file.ids(0).tolist() == [4, 1, 7, 60, 3, 9]
    found = file.answers(0)
    assert found.tokens.tolist() == MADE[0]["tokens"]
    assert found.known.all()
    assert found.label_logprobs is None


def test_the_configuration_within_distillkits_own_is_found(rows, tmp_path):
    whole = {"project_name": "x", "teacher": {"kind": "dataset", "logprob_compressor": MADE[0]["config"]}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(whole))
    assert Compressor.read(tmp_path / "run.yaml") == Compressor.read(rows / "compression_config.yaml")


def test_the_configuration_of_other_files_is_named(rows):
    other = {**MADE[0]["config"], "d": 150_000}
    (rows / "compression_config.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(ValueError, match="bytes of bytepacked_indices a place, and the compressor's conf"):
        DistillKitFile(str(rows)).answers(0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": 99}, "exact_k <= k <= d"),
        ({"exact_dtype": "int4"}, "is not a dtype"),
        ({"polynomial_terms": ["log"]}, "whole numbers, sqrt or exp"),
        ({"residual_bins": [{"element_bits": 8}]}, "each of residual_bins has"),
        ({"colour": 1}, "may have exact_dtype"),
        (
            {"exact_k": 3, "polynomial_terms": [], "residual_bins": []},
            "needs polynomial_terms or residual_bins",
        ),
    ],
)
def test_a_wrong_configuration_is_named(change, said):
    with pytest.raises(ValueError, match=said):
        Compressor.of({**MADE[0]["config"], **change}, "c.yaml")


def test_a_missing_configuration_and_former_rows_are_refused(rows, tmp_path):
    (rows / "compression_config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="--compressor"):
        DistillKitFile(str(rows))
    pq.write_table(pa.table({"input_ids": [[1]], "packed_indices": [[[1]]]}), tmp_path / "old.parquet")
    with pytest.raises(ValueError, match="former compressor"):
        DistillKitFile(str(tmp_path / "old.parquet"))


@pytest.mark.parametrize("delta", [False, True])
def test_places_of_fewer_tokens_end_with_nothing(tmp_path, delta):
    """Its writer fills what a place lacks with -inf, whose differences are no numbers, and with any token."""
    values = torch.tensor([[-0.5, -1.5, -torch.inf, -torch.inf], [-1.0, -2.0, -3.0, -4.0]])
    stored = torch.diff(values, prepend=torch.zeros(2, 1)) if delta else values
    tokens = torch.tensor([[3, 9, 7, 7], [1, 2, 3, 4]])
    config = {"d": 61, "k": 4, "exact_k": 4, "residual_bins": [], "delta_encoding": delta}
    table = {
        "input_ids": [[4, 1, 7]],
        "compressed_logprobs": [stored.contiguous().view(torch.uint8).tolist()],
        "bytepacked_indices": [pack_bits(tokens, 6).tolist()],
    }
    pq.write_table(pa.table(table), tmp_path / "data_0.parquet")
    (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(config))
    found = DistillKitFile(str(tmp_path)).answers(0)
    assert torch.equal(found.logprobs, values)
    assert torch.equal(found.tokens, tokens)
    table["bytepacked_indices"] = [pack_bits(torch.tensor([[3, 9, 7, 7], [1, 2, 2, 4]]), 6).tolist()]
    pq.write_table(pa.table(table), tmp_path / "data_0.parquet")
    with pytest.raises(ValueError, match="the token 2 twice"):
        DistillKitFile(str(tmp_path)).answers(0)
