"""Two processes that share rows, against whole rows; and which models cannot read slices."""

import json

import pytest
from helpers.forked import context
from helpers.sliced_rows import LENGTHS, compare
from tiny_models import tiny_model
from transformers import AutoConfig

from hpd.models.slices import check_model

FAMILIES = ("llama", "qwen3")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    for family in FAMILIES:
        tiny_model(family, folder / family)
    processes = [context().Process(target=compare, args=(rank, folder, FAMILIES)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_of_shared_rows_are_those_of_whole_rows(found, family):
    for at, lengths in enumerate(LENGTHS):
        of_rows = found[0][family][at]
        assert of_rows["loss"] < 1e-6
        assert of_rows["gradient"] < 2e-5
        # Label positions, dropped labels and tokens are counted once.
        assert of_rows["counts"] == of_rows["expected"]
        assert of_rows["width"] == 2 * -(-max(lengths) // 4)


def test_a_model_that_reads_its_neighbors_past_attention_is_found_on_all_processes(found):
    for of_process in found:
        assert "(llama) reads slices of a row unlike the row" in of_process["leak"]


def test_processes_that_were_given_different_rows_all_say_so(found):
    for of_process in found:
        assert "were given different ones" in of_process["other rows"]


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gemma3_text", {}, "layers of type sliding_attention"),
        ("mistral", {"sliding_window": 8}, "sliding"),
        ("qwen3_moe", {}, "mixture of experts"),
        ("qwen3_next", {}, "layers of type linear_attention"),
        ("qwen2_5_vl", {}, "reads more than text"),
    ],
)
def test_models_that_are_more_than_attention_to_all_tokens_before(family, options, message):
    config = AutoConfig.for_model(family, **options)
    with pytest.raises(ValueError, match=rf"\(cp_size\).*student \({family}\).*{message}"):
        check_model(config, "student")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "smollm3", "phi3", "granite", "olmo2"])
def test_models_of_attention_alone_are_taken(family):
    check_model(AutoConfig.for_model(family), "teacher")
