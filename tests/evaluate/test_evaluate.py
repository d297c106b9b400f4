"""Evaluation: answers in texts, data files, generation against a loop without cache or padding, the run
folder."""

import csv
import gzip
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hpd.evaluate import (
    Answer,
    ExactMatch,
    Example,
    GenerationSettings,
    Verdict,
    evaluate,
    final_answer,
    generate_answers,
    make_task,
    same_answer,
)
from hpd.evaluate.statistics import wilson_interval
from hpd.generation.drawing import Draw, Sampling, warpers
from hpd.generation.engine import encode_prompt

PROMPTS = ["3", "3 + 4 = ", "how many?", "a", "the sum of 12 and 30 is", "1 2 3 4 5 6 7 8 9"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("16 - 3 = <<16-3=13>>13 eggs.\n#### 18", "18"),
        ("#### 1\nno, wait\n#### 1,234 \nbye 7", "1,234"),
        ("####18", "18"),
        ("#### $\\boxed{18}$", "18"),
        ("the hashes end the text, 5 ####", "5"),
        (r"so \boxed{\frac{1}{2}} of 3", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}, the answer is 3", "2"),
        (r"\boxed{\text{a set } \{1, 2\}}", r"\text{a set } \{1, 2\}"),
        (r"\boxed{7} and a cut \boxed{\frac{1}{", None),
        (r"\boxed{7}, the answer is 7, or \boxed{8", None),
        (r"#### 7, no: \boxed", None),
        ("\\boxed{7} or \\boxed{8\n#### 9", "9"),
        (r"} \fbox{ 5 } {", "5"),
        (r"\boxed{} is empty, 4", "4"),
        ("The answer is 42. I checked it 3 times.", "42"),
        ("the answer is: $1,234.50.", "$1,234.50"),
        ("Final Answer: Paris\nThat was 1.", "Paris"),
        ("**Answer:** 3/4", "3/4"),
        ("The answer is **42.** Done, 3", "42"),
        ("Answer:\n\n  (3, 4)\n5", "(3, 4)"),
        ("The answer is 1. No: the answer is 2.", "2"),
        ("12 + 30 = 42", "42"),
        ("he pays $1,250.75 in 2 rates of $625.", "$625"),
        ("it fell to -3", "-3"),
        ("7-3", "3"),
        ("about 3/4 of v1.5 and x2", "3/4"),
        ("a list: 1,2", "1,2"),
        ("none at all", None),
        ("", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


SAME = [
    ("42", "42.0"),
    ("42", " 42. "),
    ("1,234,567", "1234567"),
    ("1{,}234", "1234"),
    ("$5", "5.00"),
    (r"\$5", "5"),
    ("-$5", "\u22125"),
    ("€3.50", "3.5"),
    ("007", "7"),
    (".5", "0.50"),
    ("3/4", "0.75"),
    (r"\frac{3}{4}", "3/4"),
    (r"\dfrac{3}{4}", r"\frac{3}{4}"),
    (r"$\frac{x}{4}$", r"\dfrac{x}{4}"),
    ("42 apples", "42"),
    ("42, because it is", "42"),
    (r"42\text{ km}", "42 km"),
    ("50%", r"50\%"),
    ("**Paris**", "paris"),
    ("New  York", "new york."),
    ("(1, 2)", "(1,2)"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
    ("1 1/2", "1  1/2"),
    ("9" * 5000, "9" * 5000),
]
DIFFERENT = [
    ("42", "24"),
    ("42", "42.5"),
    ("42", "-42"),
    ("4", "42"),
    ("1,234", "1.234"),
    ("3/4", "3/5"),
    ("1 1/2", "11/2"),
    ("1 2", "12"),
    ("1/0", "0"),
    ("5 m", "5 km"),
    ("42 million", "42"),
    ("7 or 8", "7"),
    ("3 + 4i", "3"),
    ("5!", "5"),
    ("2x", "2"),
    ("1e3", "1000"),
    ("Paris", "London"),
    ("", ""),
    (".", "..."),
    ("9" * 5000, "9" * 5001),
]


@pytest.mark.parametrize(
    ("first", "second", "same"), [(*pair, True) for pair in SAME] + [(*p, False) for p in DIFFERENT]
)
def test_same_answer(first: str, second: str, same: bool) -> None:
    assert same_answer(first, second) is same
    assert same_answer(second, first) is same


def test_answers_cost_one_pass_over_a_looping_text() -> None:
    for text in (r"\boxed{" * 50_000, "1," * 50_000, "answer is " * 50_000, "####" * 50_000, "9" * 200_000):
        same_answer(final_answer(text) or "", "5")


# --- task -----------------------------------------------------------------------------------------

GSM8K = [
    {"question": "How many eggs?", "answer": "9 * 2 = <<9*2=18>>18\n#### 18"},
    {"question": "How much?", "answer": "It is 1,000 + 5.\n#### 1,005"},
]


def _jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _json(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")


def _csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def _parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), path)


WRITERS: dict[str, Callable[[Path, Sequence[dict[str, Any]]], None]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
}


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as a data file."""

    def write(*rows: dict[str, Any], suffix: str = "jsonl") -> Path:
        path = tmp_path / f"data.{suffix}"
        WRITERS[suffix](path, rows)
        return path

    return write


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_reads_the_same(
    data, tmp_path: Path, monkeypatch, suffix: str, compressed: bool
) -> None:
    path = data(*GSM8K, suffix=suffix)
    if compressed:
        plain, path = path, path.with_name(path.name + ".gz")
        path.write_bytes(gzip.compress(plain.read_bytes()))
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    examples = make_task("exact-match", path).examples()
    assert [(example.id, example.prompt, example.answer) for example in examples] == [
        ("0", "How many eggs?", "18"),
        ("1", "How much?", "1,005"),
    ]
    assert examples[0].metadata == GSM8K[0]
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "(3+4)*2=", "answer": 14, "question": "no"}, "(3+4)*2=", "14"),
        ({"problem": "2/4?", "solution": r"Thus \boxed{\frac{1}{2}}."}, "2/4?", r"\frac{1}{2}"),
        ({"problem": "polar?", "answer": "(3, 4)", "solution": "long 7"}, "polar?", "(3, 4)"),
        ({"instruction": "say 0", "target": 0}, "say 0", "0"),
        (
            {
                "prompt": [{"role": "user", "content": "2?"}],
                "completion": [{"role": "assistant", "content": "2"}],
            },
            [{"role": "user", "content": "2?"}],
            "2",
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "be brief"},
                    {"role": "user", "content": "1?"},
                    {"role": "assistant", "content": "1"},
                    {"role": "user", "content": "2?"},
                    {"role": "assistant", "content": "2"},
                ],
                "answer": "2",
            },
            [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "1?"},
                {"role": "assistant", "content": "1"},
                {"role": "user", "content": "2?"},
            ],
            "2",
        ),
    ],
)
def test_columns_by_convention(data, row: dict[str, Any], prompt: Any, answer: str) -> None:
    (example,) = ExactMatch(data(row)).examples()
    assert (example.prompt, example.answer) == (prompt, answer)


def test_named_columns_template_and_limit(data) -> None:
    svamp = {
        "ID": "chal-7",
        "id": "s7",
        "Body": "290 bananas in 2 groups.",
        "Question": "Group size?",
        "Answer": 145.0,
    }
    path = data(svamp, svamp)
    task = ExactMatch(
        path, prompt_template=r"{Body} {Question} Use \boxed{}.", answer_column="Answer", limit=1
    )
    (example,) = task.examples()
    assert example.prompt == r"290 bananas in 2 groups. Group size? Use \boxed{}."
    assert example.id == "s7"
    assert _grade(task, example, "145").correct
    (example, _) = ExactMatch(
        path, prompt_column="Body", answer_column="Answer", prompt_template="Q: {prompt}"
    ).examples()
    assert example.prompt == "Q: 290 bananas in 2 groups."


def test_template_fills_the_last_user_turn(data) -> None:
    row = {"messages": [{"role": "user", "content": "2{prompt}?"}], "answer": "2"}
    (example,) = ExactMatch(data(row), prompt_template="Q: {prompt}").examples()
    assert example.prompt == [{"role": "user", "content": "Q: 2{prompt}?"}]


def test_json_lines_break_at_newlines_only(data) -> None:
    (example,) = ExactMatch(data({"prompt": "a\u2028b", "answer": "1"})).examples()
    assert example.prompt == "a\u2028b"


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"qry": "a", "answer": "1"}],
            {},
            r"1 of 1 rows have no prompt .* columns are qry, answer\. .*prompt_column",
        ),
        (
            [{"prompt": "a", "label": "1"}],
            {},
            r"1 of 1 rows have no answer .* columns are prompt, label\. .*answer_column",
        ),
        (
            [{"prompt": "a", "answer": "1"}],
            {"answer_column": "gold"},
            "no answer column gold; it has prompt, answer",
        ),
        (
            [{"prompt": "a", "answer": "1"}, {"prompt": "b"}],
            {},
            r"1 of 2 rows have no answer .*\(the first is row 2\)",
        ),
        ([{"prompt": "a", "answer": " "}], {}, "1 of 1 rows have no answer"),
        ([{"prompt": "a", "answer": " "}], {"answer_column": "answer"}, "1 of 1 rows have no 'answer'"),
        ([{"prompt": None, "answer": "1"}], {}, "1 of 1 rows have no prompt"),
        ([{"prompt": "a", "answer": {"b": 1}}], {}, "1 of 1 rows have no answer"),
        (
            [{"messages": [{"role": "assistant", "content": "a"}], "answer": "1"}],
            {},
            "no turn of role 'user'",
        ),
        (
            [{"messages": [{"role": "user", "content": None}], "answer": "1"}],
            {},
            r"row 1: turn 1 of its chat is .*None.*; every turn needs a role and a content that is a text",
        ),
        (
            [{"prompt": "a", "answer": "1"}],
            {"prompt_template": "{promt}"},
            "names promt; use {prompt} or columns .*: prompt",
        ),
        ([{"prompt": "a", "answer": "1"}], {"prompt_template": "say {answer}"}, "names answer; use"),
        ([{"prompt": "a", "answer": "1"}], {"prompt_template": "Hello"}, "names no column; use"),
        ([{"q": "a", "answer": "1"}], {"prompt_template": "{q}", "prompt_column": "q"}, "'q' has no effect"),
        ([{"prompt": "a", "answer": "1"}], {"limit": 0}, "limit is 0; give"),
        ([], {}, "has no rows"),
    ],
)
def test_task_errors(data, rows: list[dict[str, Any]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExactMatch(data(*rows), **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "a", "answer": 1}\n{"prompt"', "not a readable .jsonl file: line 2"),
        ("a.json", b'["a"]', "row 1 is a str"),
        ("a.csv", b"prompt,answer\na,1,2\n", "row 1 has more fields"),
        ("a.parquet", b"PAR2", "not a readable .parquet file"),
        ("a.jsonl.gz", b"plain", "not a readable .jsonl file"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}' * 99, mtime=0)[:-9], "not a readable .jsonl file"),
        ("a.jsonl", "é".encode("latin-1"), "not a readable .jsonl file"),
        ("a.txt", b"", "unknown format; give a .jsonl, .json, .csv, .parquet file"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ExactMatch(tmp_path / name)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data file .*nowhere\.jsonl; check the path"):
        ExactMatch(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("answer", "text", "verdict"),
    [
        ("18", "so\n#### 18.00", Verdict(correct=True, extracted="18.00")),
        ("18", "18 is wrong, it is 19", Verdict(correct=False, extracted="19")),
        ("18", "no idea", Verdict(correct=False, extracted=None)),
        ("Paris", " paris\n", Verdict(correct=True, extracted="paris")),
        ("x + 1", "x+1", Verdict(correct=True, extracted="x+1")),
    ],
)
def test_grade(data, answer: str, text: str, verdict: Verdict) -> None:
    task = ExactMatch(data({"prompt": "?", "answer": answer}))
    assert _grade(task, task.examples()[0], text) == verdict


def _grade(task: Any, example: Example, text: str) -> Verdict:
    (verdict,) = task.grade([example], [Answer(text=text)])
    return verdict


def test_grading_imports_no_torch() -> None:
    code = "import sys, hpd.evaluate.task; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env, cwd=root
    )
    assert done.stdout.strip() == "set()"


def test_gsm8k_grades_its_own_solutions(shared: Path) -> None:
    task = ExactMatch(shared / "data" / "gsm8k" / "test_even.jsonl")
    examples = task.examples()
    assert len(examples) > 600
    assert all(_grade(task, example, str(example.metadata["answer"])).correct for example in examples)
    wrong = sum(
        _grade(task, example, str(other.metadata["answer"])).correct for example, other in pairwise(examples)
    )
    assert wrong < len(examples) / 20  # neighbors with the same answer by chance


def test_math500_references_are_taken_as_a_whole(shared: Path) -> None:
    task = ExactMatch(shared / "data" / "math500" / "test.jsonl")
    examples = task.examples()
    assert all(example.answer == example.metadata["answer"].strip() for example in examples)
    agreeing = [_grade(task, example, example.metadata["solution"]).correct for example in examples]
    assert sum(agreeing) / len(agreeing) > 0.97  # the boxed answers of the reference solutions


# --- generation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; pads on the right, as trainers leave it."""
    vocabulary = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789 +-*=?.,<>"]
    core = Tokenizer(
        models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )


def _llama(tokenizer: PreTrainedTokenizerFast, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,  # far from uniform, so that rounding decides no argmax
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return _llama(tokenizer)


def _biased(model: LlamaForCausalLM, token: int) -> LlamaForCausalLM:
    """The model with a head that always prefers `token`."""
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=True)
    torch.nn.init.zeros_(model.lm_head.bias)
    with torch.no_grad():
        model.lm_head.bias[token] = 1e4
    return model


def _greedy_loop(model, tokenizer, prompt: str, num_tokens: int) -> list[int]:
    """The oracle: one prompt, no padding, no cache."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) - start < num_tokens and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids[start:]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 16])
def test_greedy_is_the_plain_loop_for_any_batch_size(model, tokenizer, batch_size: int) -> None:
    settings = GenerationSettings(max_new_tokens=24, batch_size=batch_size)
    generations = generate_answers(model, tokenizer, PROMPTS, settings)
    expected = [_greedy_loop(model, tokenizer, prompt, 24) for prompt in PROMPTS]
    assert [generation.text for generation in generations] == [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in expected
    ]
    assert [generation.num_tokens for generation in generations] == [len(ids) for ids in expected]
    assert len({generation.text for generation in generations}) == len(PROMPTS)


def test_greedy_ignores_the_checkpoints_decoding_and_restores_it(
    model, tokenizer, caplog, monkeypatch
) -> None:
    settings = GenerationSettings(max_new_tokens=16)
    plain = generate_answers(model, tokenizer, PROMPTS, settings)
    favorite = max(
        range(3, len(tokenizer)), key=lambda token: sum(tokenizer.decode([token]) in g.text for g in plain)
    )
    theirs = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        top_p=0.5,
        top_k=7,
        repetition_penalty=3.0,
        max_length=9,
        suppress_tokens=[favorite],
        eos_token_id=tokenizer.eos_token_id,
    )
    model.generation_config = theirs
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert generate_answers(model, tokenizer, PROMPTS, settings) == plain
    assert not caplog.records
    assert model.generation_config is theirs


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.9}])
def test_samples_depend_on_the_seed_and_not_on_the_batch_size(
    model, tokenizer, options: dict[str, Any]
) -> None:
    def texts(**changes: Any) -> list[str]:
        settings = GenerationSettings(max_new_tokens=16, temperature=1.5, **(options | changes))
        return [
            generation.text for generation in generate_answers(model, tokenizer, ["3 + 4 = "] * 4, settings)
        ]

    torch.manual_seed(1)
    first = texts(batch_size=4)
    torch.manual_seed(2)
    assert texts(batch_size=4) == texts(batch_size=3) == texts(batch_size=1) == first
    assert texts(batch_size=4, seed=1) != first
    assert len(set(first)) == 4  # equal prompts, different draws


def test_top_k_1_is_greedy(model, tokenizer) -> None:
    greedy = generate_answers(model, tokenizer, PROMPTS, GenerationSettings(max_new_tokens=16))
    assert (
        generate_answers(
            model, tokenizer, PROMPTS, GenerationSettings(max_new_tokens=16, temperature=2.0, top_k=1)
        )
        == greedy
    )


def test_draws_follow_the_distribution() -> None:
    num_draws = 1000
    probabilities = torch.tensor([0.1, 0.0, 0.25, 0.65])
    uniforms = (torch.arange(num_draws, dtype=torch.float64)[:, None] + 0.5) / num_draws
    draw = Draw(Sampling(uniforms, warpers(1.0)), torch.ones(num_draws, 3, dtype=torch.long))
    scores = probabilities.log().expand(num_draws, -1)
    tokens = draw(torch.zeros(num_draws, 3, dtype=torch.long), scores).argmax(-1)
    counts = torch.bincount(tokens, minlength=4)
    assert torch.allclose(counts / num_draws, probabilities, atol=1.5 / num_draws)
    ends = torch.tensor([[0.0], [1 - 2.0**-53]], dtype=torch.float64)
    extremes = Draw(Sampling(ends, warpers(1.0)), torch.ones(2, 3, dtype=torch.long))
    masked = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    assert extremes(torch.zeros(2, 3, dtype=torch.long), masked).argmax(-1).tolist() == [1, 2]


def test_finish_reasons(model, tokenizer) -> None:
    settings = GenerationSettings(max_new_tokens=5, batch_size=4)
    ended = generate_answers(_biased(model, tokenizer.eos_token_id), tokenizer, PROMPTS, settings)
    assert {(g.text, g.num_tokens, g.finish_reason) for g in ended} == {("", 1, "stop")}
    cut = generate_answers(_biased(model, tokenizer.convert_tokens_to_ids("a")), tokenizer, PROMPTS, settings)
    assert {(g.text, g.num_tokens, g.finish_reason) for g in cut} == {("aaaaa", 5, "length")}


@pytest.mark.parametrize("as_list", [False, True])
def test_end_tokens_of_the_checkpoint_and_of_the_tokenizer(model, tokenizer, as_list: bool) -> None:
    end = tokenizer.convert_tokens_to_ids("z")
    model.generation_config = GenerationConfig(eos_token_id=[end, 4] if as_list else end)
    settings = GenerationSettings(max_new_tokens=5)
    for token in (end, tokenizer.eos_token_id):
        (generation,) = generate_answers(_biased(model, token), tokenizer, ["3"], settings)
        assert (generation.num_tokens, generation.finish_reason) == (1, "stop")


@pytest.mark.parametrize("pad_token", [None, "<eos>"])
def test_missing_or_shared_pad_token(model, tokenizer, pad_token: str | None) -> None:
    settings = GenerationSettings(max_new_tokens=24, batch_size=4)
    expected = generate_answers(model, tokenizer, PROMPTS, settings)
    other = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token=pad_token
    )
    assert generate_answers(model, other, PROMPTS, settings) == expected


def test_no_end_token_at_all(model, tokenizer) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    model.generation_config = GenerationConfig()
    generations = generate_answers(model, endless, PROMPTS, GenerationSettings(max_new_tokens=4))
    assert {generation.finish_reason for generation in generations} == {"length"}


def test_flags_of_every_module_are_restored_and_training_goes_on(model, tokenizer) -> None:
    model.train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    seen = []
    model.lm_head.register_forward_hook(
        lambda *_: seen.append({module.training for module in model.modules()})
    )
    generate_answers(model, tokenizer, PROMPTS, GenerationSettings(max_new_tokens=2))
    assert seen
    assert all(state == {False} for state in seen)
    assert [module.training for module in model.modules()] == flags
    model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_flags_are_restored_after_a_failure(model, tokenizer) -> None:
    model.train()
    config = model.generation_config
    with pytest.raises(KeyboardInterrupt):
        generate_answers(model, tokenizer, PROMPTS, GenerationSettings(max_new_tokens=2), progress=_interrupt)
    assert model.training
    assert model.generation_config is config


def _interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt


def test_adapters_are_used(model, tokenizer) -> None:
    settings = GenerationSettings(max_new_tokens=16)
    base = generate_answers(model, tokenizer, PROMPTS, settings)
    model.generation_config.repetition_penalty = 3.0
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True))
    assert generate_answers(adapted, tokenizer, PROMPTS, settings) == base
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert generate_answers(adapted, tokenizer, PROMPTS, settings) != base
    assert model.generation_config.repetition_penalty == 3.0


def test_longest_prompts_go_first_and_progress_counts(model, tokenizer) -> None:
    lengths, counts = [], []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    settings = GenerationSettings(max_new_tokens=1, batch_size=2)
    generate_answers(
        model, tokenizer, PROMPTS, settings, progress=lambda done, total: counts.append((done, total))
    )
    assert lengths == sorted((len(prompt) for prompt in PROMPTS), reverse=True)[::2]
    assert counts == [(2, 6), (4, 6), (6, 6)]


def test_no_prompts(model, tokenizer) -> None:
    assert generate_answers(model, tokenizer, []) == []


def test_answers_end_with_the_context(tokenizer, caplog) -> None:
    # Learned positions: one token beyond the context would be an index error.
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=24, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3
    )
    model = GPT2LMHeadModel(config).eval()
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    model.generation_config = GenerationConfig()
    with caplog.at_level(logging.WARNING, logger="hpd"):
        generations = generate_answers(model, endless, ["a", "a" * 20], GenerationSettings(batch_size=1))
    assert [generation.num_tokens for generation in generations] == [4, 4]
    assert "Answers end after 4 tokens, not after max_new_tokens=512" in caplog.text
    with pytest.raises(ValueError, match="the longest prompt has 24 tokens, which leaves no room"):
        generate_answers(model, endless, ["a" * 24])


def _templated(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    other = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<pad>"
    )
    other.chat_template = CHAT_TEMPLATE
    return other


@pytest.mark.parametrize(
    ("prompt", "options", "text"),
    [
        ("hi", {}, "<user>hi<assistant>"),
        ("hi", {"chat_template": "always"}, "<user>hi<assistant>"),
        ("hi", {"chat_template": "never"}, "hi"),
        ("hi", {"system_prompt": "be brief"}, "<system>be brief<user>hi<assistant>"),
        (
            [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            {},
            "<system>s<user>u<assistant>",
        ),
    ],
)
def test_prompts_with_a_chat_template(tokenizer, prompt: Any, options: dict[str, Any], text: str) -> None:
    ids = encode_prompt(_templated(tokenizer), prompt, GenerationSettings(**options))
    assert ids == tokenizer(text)["input_ids"]


def test_special_tokens_come_from_the_template_or_the_tokenizer(tokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    beginning = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", bos_token="<eos>")
    beginning.chat_template = "<eos>" + CHAT_TEMPLATE
    assert encode_prompt(beginning, "a", GenerationSettings(chat_template="never")) == [
        1,
        *tokenizer("a")["input_ids"],
    ]
    assert encode_prompt(beginning, "a", GenerationSettings()) == [
        1,
        *tokenizer("<user>a<assistant>")["input_ids"],
    ]


CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("template", "prompt", "options", "message"),
    [
        (False, "hi", {"chat_template": "always"}, "'always', but the tokenizer has none"),
        (False, CHAT, {}, "a prompt is a chat, which needs a chat template, but .* has none"),
        (True, CHAT, {"chat_template": "never"}, "a prompt is a chat, .* 'never' and the tokenizer has one"),
        (
            True,
            [{"role": "system", "content": "s"}, *CHAT],
            {"system_prompt": "s"},
            "has a system turn already",
        ),
        (False, "", {}, "has no tokens"),
    ],
)
def test_prompt_errors(tokenizer, template: bool, prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_prompt(_templated(tokenizer) if template else tokenizer, prompt, GenerationSettings(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be 1 or more"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"temperature": 1.0, "top_k": -1}, "top_k is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"top_p": 0.9}, "no effect at temperature 0"),
        ({"top_k": 5}, "no effect at temperature 0"),
        ({"num_samples": 4}, "would write the same answer 4 times"),
        ({"stop": ("",)}, "stop is"),
    ],
)
def test_settings_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**options)


def test_unknown_chat_template_mode() -> None:
    # TypeError is jaxtyping's, where its import hook checks the Literal before the class does.
    with pytest.raises((ValueError, TypeError), match=r"chat_template[\s\S]*maybe|maybe[\s\S]*chat_template"):
        GenerationSettings(chat_template="maybe")  # pyright: ignore[reportArgumentType]


# --- run ------------------------------------------------------------------------------------------


class _Letters:
    """Correct is what a model that always writes "aaaaa" answers to half of the questions."""

    name = "letters"
    metric = "accuracy"
    options: dict[str, Any] = {"level": 1}  # noqa: RUF012
    defaults: dict[str, Any] = {}  # noqa: RUF012

    def examples(self) -> list[Example]:
        return [
            Example(id=f"q{index}", prompt=prompt, answer="ab"[index % 2])
            for index, prompt in enumerate(PROMPTS)
        ]

    def grade(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[Verdict]:
        return [
            Verdict(correct=a.text[:1] == e.answer, extracted=a.text[:1])
            for e, a in zip(examples, answers, strict=True)
        ]


SETTINGS = GenerationSettings(max_new_tokens=5)


@pytest.fixture
def writer(model, tokenizer) -> LlamaForCausalLM:
    return _biased(model, tokenizer.convert_tokens_to_ids("a"))


def _evals(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "evals.json").read_text())


def test_evaluate(writer, tokenizer, tmp_path: Path) -> None:
    result = evaluate(writer, tokenizer, _Letters(), SETTINGS, output_dir=tmp_path / "run", name="tiny")
    assert (result.task, result.value, result.num_examples) == ("letters", 0.5, 6)
    assert (result.mean_tokens, result.truncated) == (5.0, 1.0)
    assert result.tokens_per_second > 0
    assert [record.correct for record in result.records] == [True, False] * 3
    (entry,) = _evals(tmp_path / "run")
    assert (entry["model"], entry["task"], entry["options"]) == ("tiny", "letters", {"level": 1})
    assert (entry["metric"], entry["accuracy"], entry["engine"]) == ("accuracy", 0.5, "transformers")
    assert entry["settings"]["max_new_tokens"] == 5
    assert entry["interval"] == list(result.interval)
    lines = [json.loads(line) for line in (tmp_path / "run" / entry["records"]).read_text().splitlines()]
    assert lines[1] == {
        "eval": entry["id"],
        "id": "q1",
        "sample": 0,
        "prompt": PROMPTS[1],
        "answer": "b",
        "text": "aaaaa",
        "turns": [],
        "extracted": "a",
        "correct": False,
        "score": 0.0,
        "detail": "",
        "num_tokens": 5,
        "finish_reason": "length",
    }
    assert len(lines) == 6
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "evals.json",
        "records-letters.jsonl",
    ]


def test_evaluations_replace_themselves_and_nothing_else(writer, tokenizer, tmp_path: Path) -> None:
    foreign = {"model": "someone", "accuracy": 1.0}
    (tmp_path / "evals.json").write_text(json.dumps([foreign]))
    for name, settings in [
        ("student", SETTINGS),
        ("teacher", SETTINGS),
        ("student", GenerationSettings(max_new_tokens=3)),
        ("student", SETTINGS),
    ]:
        evaluate(writer, tokenizer, _Letters(), settings, output_dir=tmp_path, name=name)
    first, *entries = _evals(tmp_path)
    assert first == foreign
    assert [(entry["model"], entry["settings"]["max_new_tokens"]) for entry in entries] == [
        ("teacher", 5),
        ("student", 3),
        ("student", 5),
    ]
    lines = [json.loads(line) for line in (tmp_path / "records-letters.jsonl").read_text().splitlines()]
    assert [line["eval"] for line in lines[::6]] == [entry["id"] for entry in entries]
    assert len(lines) == 18


def test_data_files_are_evaluations_of_their_own(writer, tokenizer, tmp_path: Path) -> None:
    for name in ("a", "b"):
        _jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "?", "answer": "aaaaa"}])
        task = ExactMatch(tmp_path / f"{name}.jsonl")
        assert evaluate(writer, tokenizer, task, SETTINGS, output_dir=tmp_path).value == 1.0
    assert [Path(entry["options"]["data"]).name for entry in _evals(tmp_path)] == ["a.jsonl", "b.jsonl"]


def test_a_failed_write_leaves_the_old_file(writer, tokenizer, tmp_path: Path, monkeypatch) -> None:
    evaluate(writer, tokenizer, _Letters(), SETTINGS, output_dir=tmp_path, name="first")
    before = (tmp_path / "evals.json").read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        evaluate(writer, tokenizer, _Letters(), SETTINGS, output_dir=tmp_path, name="second")
    assert (tmp_path / "evals.json").read_bytes() == before


@pytest.mark.parametrize("content", ["[{", '{"model": "x"}'])
def test_a_foreign_evals_file_stops_the_run_before_it_generates(
    writer, tokenizer, tmp_path: Path, content: str
) -> None:
    (tmp_path / "evals.json").write_text(content)
    with pytest.raises(ValueError, match="move it away"):
        evaluate(writer, tokenizer, _Letters(), SETTINGS, output_dir=tmp_path, progress=_interrupt)


def test_nothing_is_written_without_a_folder(writer, tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    evaluate(writer, tokenizer, _Letters(), SETTINGS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("num_correct", "num_examples"), [(0, 10), (10, 10), (3, 10), (500, 1000), (1, 1)])
def test_wilson_interval_inverts_the_score_test(num_correct: int, num_examples: int) -> None:
    observed = num_correct / num_examples
    low, high = wilson_interval(num_correct, num_examples)
    assert 0 <= low <= observed <= high <= 1
    for bound in (
        low,
        high,
    ):  # at a bound, the observed share is 1.96 of the bound's own standard errors away
        if 1e-12 < bound < 1 - 1e-12:
            assert abs(observed - bound) == pytest.approx(
                1.959964 * (bound * (1 - bound) / num_examples) ** 0.5
            )
