"""Several samples, conversations, stop strings, figures and their intervals, paired tests, and going on after
a kill."""

import itertools
import json
import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.forked import start
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpd.evaluate import (
    Answer,
    Example,
    GenerationSettings,
    Verdict,
    evaluate,
    generate_answers,
    make_task,
    settings_for,
)
from hpd.evaluate.command import EvalCommand, eval_sections, evaluate_models
from hpd.evaluate.generate import Group, PartialAnswers, answer_examples, unfinished
from hpd.evaluate.statistics import compare_paired, majority, mean_interval, pass_at_k, sampling_interval
from hpd.evaluate.tasks import TASKS, build_task, task_and_settings
from hpd.generation.engine import TransformersEngine, cut_at
from hpd.models.load import load_model
from hpd.progress import Progress
from hpd.teachers.fingerprints import quick_fingerprint

PROMPTS = [f"say {word}:" for word in ("one", "two", "three", "four", "five")]
SAMPLED = GenerationSettings(
    max_new_tokens=12, temperature=1.0, num_samples=3, batch_size=4, chat_template="never"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_model("qwen2", tmp_path_factory.mktemp("model") / "teacher", role="teacher", seed=1)


@pytest.fixture(scope="module")
def pair(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def _problems(path: Path, count: int = 12) -> Path:
    path.write_text(
        "".join(
            json.dumps({"prompt": f"say {index}:", "answer": str(index)}) + "\n" for index in range(count)
        )
    )
    return path


class _Lengths:
    """Scored and never right or wrong; answers with an even length are ungraded."""

    name, metric = "lengths", "length_score"
    options: dict = {}  # noqa: RUF012
    defaults: dict = {}  # noqa: RUF012

    def examples(self):
        return [Example(id=str(index), prompt=prompt) for index, prompt in enumerate(PROMPTS)]

    def grade(self, examples, answers):
        return [
            Verdict(correct=None, score=float(len(a.text)) if len(a.text) % 2 else None, detail="even")
            for a in answers
        ]

    def summary(self, examples, answers, verdicts):
        return {"longest": float(max(len(answer.text) for answer in answers))}


# --- generation ---


def test_samples_of_a_problem_differ_and_depend_on_nothing_but_the_seed(pair):
    answers = generate_answers(*pair, PROMPTS, SAMPLED)
    assert len(answers) == 15
    assert len({answer.text for answer in answers[:3]}) == 3
    alone = generate_answers(*pair, PROMPTS[:1], SAMPLED)
    assert [a.text for a in alone] == [a.text for a in answers[:3]]
    few = generate_answers(
        *pair, PROMPTS, GenerationSettings(**{**vars(SAMPLED), "num_samples": 1, "batch_size": 2})
    )
    assert [answer.text for answer in few] == [answer.text for answer in answers[::3]]


def test_processes_share_the_batches_and_the_answers_are_those_of_one(pair):
    examples = [Example(id=prompt, prompt=prompt) for prompt in PROMPTS]
    engine = TransformersEngine(*pair)
    whole = answer_examples(engine, examples, SAMPLED).answers
    shares: list = []
    for rank in range(2):
        with pytest.raises(ZeroDivisionError):  # what each process hands over, before the exchange
            answer_examples(
                engine, examples, SAMPLED, group=Group(rank, 2, lambda share: shares.append(share) or 1 / 0)
            )
    assert all(share for share, _ in shares)
    joined = answer_examples(engine, examples, SAMPLED, group=Group(0, 2, lambda _: shares)).answers
    assert joined == whole


def test_conversations_hold_every_reply(pair):
    model, tokenizer = pair
    examples = [
        Example(id="a", prompt="say one:", follow_ups=("and two?", "three?")),
        Example(id="b", prompt="four?"),
    ]
    settings = GenerationSettings(max_new_tokens=6, batch_size=2)
    long, short = answer_examples(TransformersEngine(model, tokenizer), examples, settings).answers
    assert (len(long.turns), long.turns[-1], short.turns) == (3, long.text, ())
    chat = [{"role": "user", "content": "say one:"}]
    for question, reply in itertools.zip_longest(("and two?", "three?"), long.turns):
        (expected,) = generate_answers(model, tokenizer, [chat], settings)
        assert expected.text == reply
        chat += [{"role": "assistant", "content": reply}, {"role": "user", "content": question or ""}]
    tight = GenerationSettings(max_new_tokens=400)
    replies = answer_examples(TransformersEngine(model, tokenizer), examples[:1], tight).answers[0]
    assert replies.num_tokens < 512  # the replies share the context of 512 tokens


def test_stop_strings_end_an_answer_before_themselves(pair):
    free = generate_answers(*pair, PROMPTS, GenerationSettings(max_new_tokens=12, chat_template="never"))
    stop = next(answer.text[3:6] for answer in free if len(answer.text) > 8)
    stopped = generate_answers(
        *pair, PROMPTS, GenerationSettings(max_new_tokens=12, chat_template="never", stop=(stop,))
    )
    assert [answer.text for answer in stopped] == [cut_at(answer.text, (stop,)) for answer in free]
    for before, after in zip(free, stopped, strict=True):
        found = stop in before.text
        assert after.finish_reason == ("stop" if found else before.finish_reason)
        assert after.num_tokens <= before.num_tokens
        assert found or after.num_tokens == before.num_tokens
    assert sum(answer.num_tokens for answer in stopped) < sum(answer.num_tokens for answer in free)


def test_system_prompt_without_a_template_is_a_paragraph(pair):
    from hpd.generation.engine import encode_prompt

    tokenizer = pair[1]
    ids = encode_prompt(tokenizer, "hi", GenerationSettings(chat_template="never", system_prompt="be brief"))
    assert tokenizer.decode(ids) == "be brief\n\nhi"


# --- settings and tasks ---


_PLAIN = {"system_prompt": "step by step", "max_new_tokens": 99}
_HELPFUL = "You are a helpful assistant."


@pytest.mark.parametrize(
    ("names", "defaults", "want"),
    [
        ("aime24 aime25 amc", _PLAIN, (0.7, 0.95, 10240, 32, "step by step")),
        ("math500 olympiadbench gpqa gsm8k", _PLAIN, (0.7, 0.95, 10240, 8, "step by step")),
        ("humaneval humaneval+ mbpp mbpp+", {"max_new_tokens": 99}, (0.0, 1.0, 10240, 1, _HELPFUL)),
        ("humaneval mbpp", {"chat_template": "never"}, (0.0, 1.0, 10240, 1, None)),
        ("alpaca_eval mt_bench arena_hard", {"max_new_tokens": 99}, (0.7, 0.95, 4096, 1, _HELPFUL)),
    ],
)
def test_the_preset_paper_is_the_papers(names, defaults, want):
    for name in names.split():
        assert name in TASKS
        found = settings_for(SimpleNamespace(name=name, defaults=defaults), "paper")
        fields = ("temperature", "top_p", "max_new_tokens", "num_samples", "system_prompt")
        assert tuple(getattr(found, field) for field in fields) == want, name


def test_what_is_given_goes_before_the_preset_before_the_task(tmp_path):
    row = {"problem": "?", "answer": "1"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    task = make_task("aime24", tmp_path / "a.jsonl")
    assert settings_for(task).max_new_tokens == 8192
    paper = settings_for(task, "paper")
    assert (paper.temperature, paper.top_p, paper.num_samples, paper.max_new_tokens) == (0.7, 0.95, 32, 10240)
    assert settings_for(make_task("math500", tmp_path / "a.jsonl"), "paper").num_samples == 8
    assert settings_for(task, "paper", num_samples=2, max_new_tokens=9).max_new_tokens == 9
    with pytest.raises(ValueError, match="preset must be greedy or paper"):
        settings_for(task, "papr")
    upstream = {"prompt": [{"role": "user", "content": "a"}], "reward_model": {"ground_truth": "1"}}
    (tmp_path / "u.jsonl").write_text("".join(json.dumps(upstream) + "\n" for _ in range(4)))
    sampled = make_task("aime24", tmp_path / "u.jsonl")
    assert (settings_for(sampled).num_samples, settings_for(sampled, temperature=0.0).num_samples) == (4, 1)


def test_tasks_of_a_folder_a_file_and_a_list(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    for split, count in (("train", 4), ("test", 3)):
        rows = [{"question": f"{split} {i}", "answer": f"so\n#### {i}"} for i in range(count)]
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _problems(tmp_path / "mine.jsonl")
    sections = eval_sections(f"gsm8k, exact-match={tmp_path / 'mine.jsonl'}", tmp_path, few_shot=0)
    first, second = (task_and_settings(section)[0] for section in sections)
    assert (len(first.examples()), len(second.examples())) == (3, 12)
    task = build_task("gsm8k", tmp_path, few_shot=2)
    prompts = [example.prompt for example in task.examples()]
    assert all(
        prompt.count("Question: train") == 2 and prompt.endswith(f"Question: test {i}\nAnswer:")
        for i, prompt in enumerate(prompts)
    )
    assert "Answer: so\n#### " in prompts[0]
    settings = settings_for(task)
    assert (settings.chat_template, settings.system_prompt, settings.stop) == (
        "never",
        None,
        ("\nQuestion:",),
    )
    drawn = build_task("exact-match", tmp_path / "mine.jsonl", limit=5, limit_seed=3)
    ids = [example.id for example in drawn.examples()]
    assert ids == [
        e.id for e in build_task("exact-match", tmp_path / "mine.jsonl", limit=5, limit_seed=3).examples()
    ]
    assert len(set(ids)) == 5
    assert ids != ["0", "1", "2", "3", "4"]
    given = ["exact-match.prompt_template=Q {prompt}"]
    (section,) = eval_sections("exact-match", tmp_path / "mine.jsonl", given, temperature=0.5)
    task, settings = task_and_settings(section, top_k=3)
    assert task.examples()[0].prompt == "Q say 0:"
    assert (settings.temperature, settings.top_k, settings.batch_size) == (0.5, 3, 32)


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        ("gsm8j", {}, "Did you mean 'gsm8k'"),
        ("exact-match", {"limit_seed": 1}, "limit_seed has no effect without limit"),
        ("exact-match", {"few_shot_data": "x.jsonl"}, "few_shot_data has no effect"),
        ("exact-match", {"options": ["color=red"]}, "no task has an option 'color'"),
        ("exact-match", {"options": ["exact-match.color=red"]}, "has no option 'color'"),
        ("exact-match", {"options": ["judge.model=x"]}, "no task has an option 'judge.model'"),
        ("exact-match,exact-match", {}, "named twice"),
        ("", {}, "no tasks"),
    ],
)
def test_task_choices_that_make_no_sense(tmp_path, spec, arguments, message):
    data = _problems(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=message):
        [task_and_settings(section) for section in eval_sections(spec, data, **arguments)]


def test_a_folder_without_the_task_and_the_hub_offline(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data for 'gsm8k': expected gsm8k/test\*"):
        make_task("gsm8k", tmp_path)
    with pytest.raises(
        ValueError, match=r"openai/gsm8k:main:test is not available from the Hub; name a local file"
    ):
        make_task("gsm8k")
    with pytest.raises(ValueError, match="no data of its own on the Hub"):
        make_task("exact-match")


# --- figures ---


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 4), (4, 3, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n, c, k):
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_majority_counts_equal_answers_once_and_shares_ties():
    same = lambda a, b: a.strip() == b.strip()  # noqa: E731
    assert majority(["1", " 1", "2"], [True, True, False], same) == 1.0
    assert majority(["1", "2"], [True, False], same) == 0.5
    assert majority([None, "2", None], [False, False, False], same) == 0.0
    assert majority([None], [False], same) == 0.0


def test_intervals_cover_what_they_should():
    """Over repeated draws of problems, 95 % intervals hold the truth about 95 times in 100."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        rates = generator.beta(1, 1, size=60)  # true mean 1/2
        values = (generator.random((60, 4)) < rates[:, None]).astype(float)
        low, high = mean_interval(values)
        held += low <= 0.5 <= high
    assert 88 <= held <= 100
    certain = np.array([[1.0, 1.0], [0.0, 0.0]])
    low, high = sampling_interval(certain)  # two equal answers to each problem make it likely, not certain
    assert mean_interval(certain)[0] < low < 0.5 < high < mean_interval(certain)[1]


def test_mcnemar_is_the_binomial_test_on_the_problems_that_differ():
    first = np.array([[1.0]] * 10 + [[0.0]] * 10)
    second = np.array([[1.0]] * 9 + [[0.0]] + [[1.0]] * 6 + [[0.0]] * 4)
    comparison = compare_paired(first, second)
    tail = sum(math.comb(7, k) for k in (6, 7)) / 2**7
    assert (comparison.test, comparison.difference) == ("McNemar", 0.25)
    assert comparison.p_value == pytest.approx(2 * tail)
    assert compare_paired(first, first).p_value == 1.0


def test_sign_flips_see_a_small_difference_that_all_problems_share():
    generator = np.random.default_rng(1)
    first = generator.normal(size=(50, 1)) * 10
    shifted = compare_paired(first, first + 0.5 + 0.1 * generator.normal(size=(50, 1)))
    assert (shifted.test, shifted.p_value < 0.01) == ("sign flips", True)
    assert shifted.interval[0] < 0.5 < shifted.interval[1] < 1
    noise = compare_paired(first, first + generator.normal(size=(50, 1)))
    assert noise.p_value > 0.01
    missing = first.copy()
    missing[3] = np.nan
    assert compare_paired(missing, first).num_problems == 49


def test_scores_without_right_or_wrong_and_answers_without_a_verdict(pair, tmp_path):
    result = evaluate(*pair, _Lengths(), SAMPLED, tmp_path)
    scores = result.scores()
    assert scores.shape == (5, 3)
    assert result.num_ungraded == np.isnan(scores).sum() > 0
    means = [row[~np.isnan(row)].mean() for row in scores if not np.isnan(row).all()]
    assert result.value == pytest.approx(np.mean(means))
    assert result.figures["longest"] >= np.nanmax(scores)
    assert not any(key.startswith(("pass@", "maj@")) for key in result.figures)
    (entry,) = json.loads((tmp_path / "evals.json").read_text())
    assert (entry["metric"], entry["length_score"], entry["num_ungraded"]) == (
        "length_score",
        result.value,
        result.num_ungraded,
    )
    records = [json.loads(line) for line in (tmp_path / "records-lengths.jsonl").read_text().splitlines()]
    assert [(r["id"], r["sample"]) for r in records] == [(str(i), s) for i in range(5) for s in range(3)]
    assert {r["score"] is None for r in records} == {True, False}


def test_figures_of_several_samples(pair, tmp_path):
    result = evaluate(*pair, make_task("exact-match", _problems(tmp_path / "p.jsonl")), SAMPLED)
    right = (result.scores() > 0).sum(axis=1)
    assert result.figures["pass@3"] == pytest.approx(np.mean(right > 0))
    assert result.figures["pass@1"] == result.figures["avg@3"] == pytest.approx(result.value)
    assert 0 <= result.figures["maj@3"] <= 1
    assert {"sampling_interval", "std_over_samples", "pass@2"} <= result.figures.keys()


# --- going on ---


def test_finished_batches_are_kept_and_a_cut_line_is_dropped(tmp_path):
    partial = PartialAnswers(tmp_path, "x", {"model": "m", "seed": 1})
    answers = [
        Answer(text="a\u2028b", turns=("x", "a\u2028b"), num_tokens=3, finish_reason="length"),
        Answer(text=""),
    ]
    partial.append(0, answers, 1.5)
    partial.append(1, answers[:1], 0.5)
    (path,) = unfinished(tmp_path)
    path.write_text(path.read_text(encoding="utf-8")[:-7], encoding="utf-8")
    again = PartialAnswers(tmp_path, "x", {"seed": 1, "model": "m"})
    assert (again.batch(0), again.batch(1), len(again)) == ((answers, 1.5), None, 2)
    again.append(1, answers[:1], 0.5)
    assert PartialAnswers(tmp_path, "x", {"model": "m", "seed": 1}).batch(1) == (answers[:1], 0.5)
    assert len(PartialAnswers(tmp_path, "x", {"model": "m", "seed": 2})) == 0


def test_a_killed_evaluation_goes_on_and_ends_the_same(folder, tmp_path):
    data = _problems(tmp_path / "p.jsonl", 24)
    generation = {
        "num_samples": 2,
        "temperature": 1.0,
        "max_new_tokens": 60,
        "batch_size": 2,
        "seed": 0,
    }

    def command(output: str) -> EvalCommand:
        (section,) = eval_sections("exact-match", data, **generation)
        tasks = [task_and_settings(section, chat_template="never")]
        return EvalCommand(models=(str(folder),), tasks=tasks, output=tmp_path / output)

    evaluate_models(command("whole"))
    process = start(
        "eval",
        folder,
        "--data",
        data,
        "--output",
        tmp_path / "cut",
        "--batch-size",
        2,
        "--samples",
        2,
        "--temperature",
        1,
        "--max-new-tokens",
        60,
        "--chat-template",
        "never",
    )
    deadline, lines = time.monotonic() + 200, 0
    while lines < 4 and time.monotonic() < deadline and process.is_alive():
        lines = sum(path.read_text().count("\n") for path in (tmp_path / "cut").glob("partial-*"))
        time.sleep(0.005)
    process.kill()
    process.join()
    (partial,) = (tmp_path / "cut").glob("partial-*.jsonl")
    kept = json.loads(partial.read_text(encoding="utf-8").split("\n")[1])
    assert not (tmp_path / "cut" / "evals.json").exists()
    done: list[int] = []

    class Counted(Progress):
        def bar(self, name):
            return lambda count, total, note="": done.append(count)

    evaluate_models(command("cut"), Counted())
    assert (kept["batch"], len(done)) == (0, 24)
    whole, cut = ((tmp_path / name / "records-exact-match.jsonl").read_text() for name in ("whole", "cut"))
    assert whole == cut
    evals = [json.loads((tmp_path / name / "evals.json").read_text())[0] for name in ("whole", "cut")]
    for entry in evals:
        entry.pop("tokens_per_second")
    assert evals[0] == evals[1]
    assert not list((tmp_path / "cut").glob("partial-*"))


def test_other_weights_under_the_same_name_start_anew(folder):
    before = quick_fingerprint(str(folder), "auto")
    assert before == quick_fingerprint(str(folder), "auto") != quick_fingerprint(str(folder), "float32")
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(weights.stat().st_atime_ns, weights.stat().st_mtime_ns + 1))
    assert quick_fingerprint(str(folder), "auto") != before


# --- engines ---


def test_vllm_is_called_with_token_ids_and_a_seed_per_answer(monkeypatch, pair):
    """vLLM cannot run here: what it is given is checked against a stand-in with its signatures."""
    import types

    calls: list = []
    started: list = []

    class SamplingParams:
        def __init__(self, *, temperature, max_tokens, stop=None, top_p=1.0, top_k=0, seed=None):
            self.__dict__.update(locals())

    class LLM:
        def __init__(self, model, *, generation_config, **settings):
            assert generation_config == "vllm"
            started.append(settings)
            self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=512))

        def generate(self, prompts, sampling_params, *, use_tqdm):
            calls.append((prompts, sampling_params))
            done = types.SimpleNamespace(text="x", token_ids=[1, 2], finish_reason="length")
            return [types.SimpleNamespace(outputs=[done]) for _ in prompts]

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    inputs = types.ModuleType("vllm.inputs")
    inputs.TokensPrompt = lambda prompt_token_ids: {"prompt_token_ids": prompt_token_ids}
    module.__spec__ = types.SimpleNamespace(name="vllm")
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.inputs", inputs)
    from hpd.generation.vllm_engine import VllmEngine, VllmOptions

    tokenizer = pair[1]
    options = VllmOptions(memory_share=0.5, max_length=256, eager=True)
    engine = VllmEngine("some/model", tokenizer, dtype="float32", options=options)
    (settings,) = started
    assert {k: v for k, v in settings.items() if k not in ("tokenizer", "revision")} == {
        "dtype": "float32",
        "tensor_parallel_size": 1,
        "gpu_memory_utilization": 0.5,
        "max_model_len": 256,
        "enforce_eager": True,
    }
    examples = [Example(id=prompt, prompt=prompt) for prompt in PROMPTS]
    answers = answer_examples(engine, examples, SAMPLED).answers
    assert answers == [Answer(text="x", num_tokens=2, finish_reason="length")] * 15
    ((prompts, parameters),) = calls
    assert sorted(p["prompt_token_ids"] for p in prompts) == sorted(
        tokenizer(p)["input_ids"] for p in PROMPTS for _ in range(3)
    )
    assert len({p.seed for p in parameters}) == 15
    assert {(p.temperature, p.max_tokens, p.top_p, p.top_k) for p in parameters} == {(1.0, 12, 1.0, -1)}
    calls.clear()
    answer_examples(engine, examples, GenerationSettings(max_new_tokens=5, stop=("x",)))
    assert {(p.temperature, p.seed, tuple(p.stop)) for p in calls[0][1]} == {(0.0, None, ("x",))}


def test_vllm_without_vllm_says_what_to_install(pair):
    from hpd.generation.vllm_engine import VllmEngine

    with pytest.raises(ValueError, match=r"pip install 'hybrid-policy-distillation\[vllm\]'"):
        VllmEngine("some/model", pair[1], dtype="float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("says", [True, False])
def test_auto_is_the_dtype_of_the_checkpoint(tmp_path, dtype, says):
    """vLLM's own auto halves float32; and a config.json need not say."""
    from hpd.config.models import ModelConfig
    from hpd.models.dtypes import dtype_name, loaded_dtype

    folder = tiny_model("llama", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    if not says:
        config = json.loads((folder / "config.json").read_text())
        config.pop("dtype")
        (folder / "config.json").write_text(json.dumps(config))
    source = ModelConfig(model=str(folder), dtype="auto")
    assert dtype_name(loaded_dtype(source, "model")) == dtype
    assert next(load_model(source, "model").parameters()).dtype == getattr(torch, dtype)
    assert loaded_dtype(ModelConfig(model=str(folder), dtype="float16"), "model") == torch.float16


def test_generation_leaves_the_global_generators_alone(pair):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    generate_answers(*pair, PROMPTS, SAMPLED)
    assert torch.equal(torch.get_rng_state(), before)
