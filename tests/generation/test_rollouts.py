"""Rollouts: the same tokens whatever the batch, the same log-probabilities as in training, ends and cuts as
stated."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers.trainers import first_batch, make_trainer, rows, weights
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_pair
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hpd.batch import TokenBatch, uniforms
from hpd.data.collator import DistillCollator
from hpd.data.taken_apart import TrainingRow, rows_of
from hpd.generation.engine import end_token_ids
from hpd.generation.rollouts import Rollout, StudentRollouts, make_engine
from hpd.generation.vllm_engine import VllmRollouts, _starting_engines_with, rollout_dtype
from hpd.methods.prefixes import Prefixes, ReplayConfig, RolloutConfig
from hpd.methods.regime import choose_regime
from hpd.methods.table import choose_terms
from hpd.training.mixing import PrefixMixer, ReplayBuffer, repeated_share
from hpd.training.scheduled import ScheduledTerms


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def teacher(pair):
    return AutoModelForCausalLM.from_pretrained(pair[1])


def make(model, pair, teacher=None, **config):
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    return make_engine(
        RolloutConfig(**config), lambda: model, model, Accelerator(cpu=True), tokenizer, teacher
    )


def prompts_of(pair, texts):
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    return [tokenizer(text)["input_ids"] for text in texts]


TEXTS = ["say one:", "say two three:", "a", "what is the sum of the two numbers?", "say seven: seven"]


def numbers(count, length, seed=0):
    return uniforms(torch.arange(count) * 7919, seed=seed, step=3, count=length)


def test_same_numbers_same_tokens_whatever_batch_and_order(pair, teacher):
    prompts, draws = prompts_of(pair, TEXTS), numbers(5, 24)
    whole = make(teacher, pair, max_new_tokens=24).generate(prompts, [24] * 5, draws, 0)
    order = [3, 0, 4, 2, 1]
    small = make(teacher, pair, max_new_tokens=24, batch_size=2)
    other = small.generate([prompts[i] for i in order], [24] * 5, draws[order], 0)
    assert [other[order.index(i)].tokens for i in range(5)] == [rollout.tokens for rollout in whole]
    again = make(teacher, pair).generate(prompts, [24] * 5, numbers(5, 24, seed=1), 0)
    assert [r.tokens for r in again] != [r.tokens for r in whole]
    assert any(r.ended for r in whole)
    assert any(not r.ended for r in whole) or any(len(r.tokens) < 24 for r in whole)


def test_left_padding_does_not_change_log_probabilities(pair, teacher):
    """What generation saw (left padding, KV cache) is what training sees (right padding, one forward)."""
    prompts = prompts_of(pair, TEXTS)
    rollouts = make(teacher, pair).generate(prompts, [12] * 5, numbers(5, 12), 0)
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        ids = torch.tensor([prompt + rollout.tokens])
        with torch.no_grad():
            logprobs = teacher(input_ids=ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        expected = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, rtol=1e-4, atol=1e-5)


def test_draws_follow_the_students_distribution(pair, teacher):
    prompt = prompts_of(pair, ["say"])[0]
    with torch.no_grad():
        probs = teacher(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    drawn = make(teacher, pair, batch_size=1000).generate(
        [prompt] * 2000, [1] * 2000, torch.rand(2000, 1).double(), 0
    )
    counts = torch.bincount(torch.tensor([r.tokens[0] for r in drawn]), minlength=len(probs)) / 2000
    assert (counts - probs).abs().max() < 0.05
    top = make(teacher, pair, top_k=1).generate([prompt] * 4, [1] * 4, torch.rand(4, 1).double(), 0)
    assert {r.tokens[0] for r in top} == {int(probs.argmax())}


def test_teacher_mixture_is_the_mixture(pair, teacher):
    student = AutoModelForCausalLM.from_pretrained(pair[0])
    prompts = prompts_of(pair, TEXTS[:2])
    engine = make(student, pair, teacher, teacher_share=0.3)
    rollouts = engine.generate(prompts, [6, 6], numbers(2, 6), 0)
    from hpd.methods.sampling import inverse_cdf

    for prompt, rollout, draws in zip(prompts, rollouts, numbers(2, 6), strict=True):
        for step, token in enumerate(rollout.tokens):
            ids = torch.tensor([prompt + rollout.tokens[:step]])
            with torch.no_grad():
                p, q = (m(input_ids=ids).logits[0, -1].softmax(-1) for m in (teacher, student))
            assert token == int(inverse_cdf((0.3 * p + 0.7 * q)[None], draws[None, step, None]))
    with pytest.raises(ValueError, match="teacher that runs next to"):
        make(student, pair, None, teacher_share=0.3)


def test_generation_leaves_the_model_as_it_was(pair):
    model = AutoModelForCausalLM.from_pretrained(pair[0])
    model.generation_config.repetition_penalty = 5.0
    model.gradient_checkpointing_enable()
    peft_model = get_peft_model(
        model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    )
    peft_model.train()
    plain = make(peft_model, pair).generate(prompts_of(pair, TEXTS), [8] * 5, numbers(5, 8), 0)
    assert peft_model.training
    assert model.is_gradient_checkpointing
    assert model.generation_config.repetition_penalty == 5.0
    with peft_model.disable_adapter():
        assert make(peft_model, pair).generate(prompts_of(pair, TEXTS), [8] * 5, numbers(5, 8), 0) != plain


class Writer:
    """An engine that writes known tokens."""

    def __init__(self, tokens=(7, 8), ended=True):
        self.tokens, self.ended, self.calls = list(tokens), ended, []

    def generate(self, prompts, limits, uniforms, step):
        self.calls.append((step, [list(p) for p in prompts]))
        return [
            Rollout(self.tokens[:limit], self.ended, [-1.0] * len(self.tokens[:limit])) for limit in limits
        ]


COLLATE = DistillCollator(DataCollatorForLanguageModeling(pad_token_id=0))


def mixer(prefixes, writer=None, rollouts=None, **options):
    options = {"seed": 0, "max_length": 32, **options}
    return PrefixMixer(
        prefixes, rollouts or RolloutConfig(max_new_tokens=4), COLLATE, lambda: writer or Writer(), **options
    )


def batch_of(count, offset=0):
    ids = [[10 + offset + i, 20, 30 + i, 31, 32] for i in range(count)]
    return COLLATE([{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids])


def written(batch):
    """Rows of a batch whose labels are the student's."""
    labels = TokenBatch.pop(dict(batch))
    return set(labels.rows[labels.by_student].tolist())


def test_a_rollout_is_a_row_with_the_students_labels():
    (batch,) = mixer(Prefixes(student=1.0))([batch_of(2)], 0, 0.0)
    assert batch["input_ids"].tolist() == [[10, 20, 7, 8], [11, 20, 7, 8]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8]] * 2
    taken = TokenBatch.pop(batch)
    assert taken.by_dataset.tolist() == []
    assert taken.by_student.tolist() == [0, 1, 2, 3]


def test_truncated_rollouts_get_no_end_label_and_may_be_masked():
    keep = mixer(Prefixes(student=1.0), Writer([7, 8, 9, 9, 9], ended=False))([batch_of(1)], 0, 0.0)[0]
    assert keep["labels"].tolist() == [[-100, -100, 7, 8, 9, 9]]
    config = RolloutConfig(max_new_tokens=4, truncated="mask")
    masked = mixer(Prefixes(student=1.0), Writer([7, 8, 9, 9, 9], ended=False), config)(
        [batch_of(1)], 0, 0.0
    )[0]
    assert masked["labels"].tolist() == [[-100] * 6]


def test_long_prompts_keep_their_end_in_generation_and_training():
    writer = Writer()
    (batch,) = mixer(Prefixes(student=1.0), writer, RolloutConfig(max_new_tokens=4, max_prompt_tokens=1))(
        [batch_of(1)], 0, 0.0
    )
    assert writer.calls == [(0, [[20]])]
    assert batch["input_ids"].tolist() == [[20, 7, 8]]


def test_rows_never_outgrow_max_length():
    (batch,) = mixer(Prefixes(student=1.0), Writer([7] * 9, ended=False), max_length=4)([batch_of(1)], 0, 0.0)
    assert batch["input_ids"].tolist() == [[10, 20, 7, 7]]


def test_continuation_keeps_the_datasets_labels_before_the_cut():
    seen = set()
    for step in range(20):
        (batch,) = mixer(Prefixes(student=1.0, continue_tokens=2))([batch_of(1)], step, 0.0)
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        cut = len(ids) - 2
        seen.add(cut)
        assert ids[:cut] == [10, 20, 30, 31, 32][:cut]
        assert ids[cut:] == labels[cut:] == [7, 8]
        assert labels[2:cut] == ids[2:cut]
        taken = TokenBatch.pop(batch)
        assert (len(taken.by_dataset), len(taken.by_student)) == (cut - 2, 2)
    assert seen == {2, 3, 4}


def test_only_the_students_tokens_are_labels_where_no_term_reads_the_dataset():
    (batch,) = mixer(Prefixes(student=0.5), on_dataset=False)([batch_of(40)], 0, 0.0)
    assert {tuple(labels[2:4]) for labels in batch["labels"].tolist()} == {(7, 8), (-100, -100)}


def test_shares_by_row_are_the_coins_and_by_batch_all_or_nothing():
    counts = [len(written(mixer(Prefixes(student=0.3))([batch_of(50)], step, 0.0)[0])) for step in range(10)]
    assert 100 < sum(counts) < 200  # 500 coins at 0.3; five standard deviations are 51
    assert len(set(counts)) > 3
    counts = [
        len(written(mixer(Prefixes(student=0.3, mix="batch"))([batch_of(50)], step, 0.0)[0]))
        for step in range(40)
    ]
    assert set(counts) == {0, 50}
    assert 3 <= sum(count > 0 for count in counts) <= 22


def test_schedule_moves_the_share():
    ramp = Prefixes(student={"schedule": "linear", "start": 0.0, "end": 1.0})
    assert [len(written(mixer(ramp)([batch_of(30)], 0, progress)[0])) for progress in (0.0, 1.0)] == [0, 30]


def test_choice_and_tokens_do_not_depend_on_the_split_into_micro_batches():
    class Echo(Writer):
        def generate(self, prompts, limits, uniforms, step):
            return [Rollout([int(1000 * u) for u in row[:3]], True, [0.0] * 3) for row in uniforms]

    whole = mixer(Prefixes(student=0.5), Echo())([batch_of(8)], 5, 0.0)
    parts = mixer(Prefixes(student=0.5), Echo())([batch_of(4), batch_of(4, offset=4)][::-1], 5, 0.0)[::-1]
    # batch_of numbers its answers from 30 in each part, so compare what the student wrote to equal rows only
    assert sorted(map(tuple, whole[0]["input_ids"][:4].tolist())) == sorted(
        map(tuple, parts[0]["input_ids"].tolist())
    )
    other = mixer(Prefixes(student=0.5), Echo())([batch_of(8)], 6, 0.0)
    assert not torch.equal(whole[0]["input_ids"], other[0]["input_ids"])


def test_equal_rows_of_a_step_get_different_rollouts():
    class Echo(Writer):
        def generate(self, prompts, limits, uniforms, step):
            return [Rollout([int(1e6 * u) for u in row[:2]], True, [0.0] * 2) for row in uniforms]

    row = {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}
    (batch,) = mixer(Prefixes(student=1.0), Echo())([COLLATE([row] * 4)], 0, 0.0)
    assert len({tuple(ids) for ids in batch["input_ids"].tolist()}) == 4


def test_a_row_without_prompt_is_continued_from_its_first_token():
    row = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    (batch,) = mixer(Prefixes(student=1.0))([COLLATE([row])], 0, 0.0)
    assert batch["input_ids"].tolist() == [[1, 7, 8]]


@pytest.mark.parametrize("padding_free", [False, True])
def test_batches_come_apart_into_their_rows(padding_free):
    collate = DistillCollator(
        DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free, pad_to_multiple_of=8)
    )
    given = [([5, 6, 7], [-100, 6, 7]), ([8, 9], [-100, 9])]
    batch = collate([{"input_ids": ids, "labels": labels} for ids, labels in given])
    assert rows_of(batch) == [TrainingRow(*row) for row in given]  # no prompt of the teacher's


def test_replay_books_age_capacity_and_survives_a_checkpoint():
    buffer = ReplayBuffer(ReplayConfig(capacity=3, max_age_steps=2))
    for step in range(5):
        buffer.add([{"input_ids": [step], "labels": [step]}], step)
    assert [stored.step for stored in buffer._stored] == [2, 3, 4]
    assert buffer.full
    assert buffer.expire(5) == 1
    assert [buffer.draw(u).step for u in (0.0, 0.49, 0.5, 0.99)] == [3, 3, 4, 4]
    again = ReplayBuffer(ReplayConfig(capacity=3))
    again.load_state_dict(buffer.state_dict())
    assert again.state_dict() == buffer.state_dict()


def test_replay_fills_first_and_then_mixes():
    config = RolloutConfig(max_new_tokens=4, replay=ReplayConfig(capacity=8, fresh=0.5, max_age_steps=3))
    source = mixer(Prefixes(student=1.0), rollouts=config)
    for step in range(6):
        source([batch_of(4)], step, 0.0)
    sums = source.read()
    assert sums["student_rows"] == 24
    assert sums["rollouts"] + sums["replayed"] == 24
    assert 8 <= sums["rollouts"] < 24
    assert sums["age"] >= sums["replayed"]


def test_rollouts_stay_for_all_updates_of_a_batch():
    writer = Writer()
    source = mixer(Prefixes(student=1.0), writer, num_updates=3)
    batches = [source([batch_of(2)], step, 0.0)[0]["input_ids"] for step in range(4)]
    assert [step for step, _ in writer.calls] == [0, 3]
    assert torch.equal(batches[0], batches[2])


def test_repetition_counts_four_grams():
    assert repeated_share([1, 2, 3, 4, 5, 6]) == 0.0
    assert repeated_share([1] * 10) == pytest.approx(6 / 7)
    assert repeated_share([1, 2]) == 0.0


def test_vllm_engine_sends_weights_once_an_update_and_cuts():
    """vLLM needs a GPU: its wrapper is checked against a stand-in with VLLMGeneration's two methods."""
    calls = []

    def generate(prompts, images, num_generations):
        calls.append(("generate", len(prompts)))
        return prompts, [[7, 8, 2]] * len(prompts), [[[-0.5], [-0.25], [-0.1]]] * len(prompts), None

    stand_in = SimpleNamespace(sync_weights=lambda: calls.append("sync"), generate=generate)
    engine = VllmRollouts(stand_in, Accelerator(cpu=True), [2])
    whole, cut = engine.generate([[1], [3]], [3, 2], torch.zeros(2, 3), 0)
    engine.generate([[1]], [3], torch.zeros(1, 3), 0)
    engine.generate([[1]], [3], torch.zeros(1, 3), 1)
    assert whole == Rollout([7, 8, 2], True, [-0.5, -0.25, -0.1])
    assert cut == Rollout([7, 8], False, [-0.5, -0.25])
    assert [c for c in calls if c == "sync"] == ["sync", "sync"]


def test_log_probabilities_of_a_reshaped_draw_are_not_the_students(pair):
    """TRL has vLLM return them after temperature and cuts."""
    stand_in = SimpleNamespace(
        sync_weights=lambda: None,
        generate=lambda prompts, images, num_generations: (prompts, [[7, 2]], [[[-0.5], [None]]], None),
    )
    for exactly in (True, False):
        engine = VllmRollouts(stand_in, Accelerator(cpu=True), [2], exactly)
        (rollout,) = engine.generate([[1]], [3], torch.zeros(1, 3), 0)
        assert rollout.tokens == [7, 2]
        assert str(rollout.logprobs) == ("[-0.5, nan]" if exactly else "[]")
    assert RolloutConfig(engine="vllm", vllm={"max_num_seqs": 4}).draws_student_exactly
    assert not RolloutConfig(engine="vllm", vllm={"generation_kwargs": {"seed": 1}}).draws_student_exactly


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vllm_is_told_the_students_dtype(dtype):
    """Its own choice halves a float32 student."""
    student = torch.nn.Linear(2, 2, dtype=dtype)
    assert rollout_dtype(RolloutConfig(engine="vllm"), student) == str(dtype).removeprefix("torch.")
    asked = RolloutConfig(engine="vllm", vllm={"dtype": "float16"})
    assert rollout_dtype(asked, student) == "float16"
    started = []
    trl = SimpleNamespace(LLM=lambda **settings: started.append(settings))
    before = trl.LLM
    with _starting_engines_with(trl, dtype="float32"):
        trl.LLM(model="m", seed=0)
    assert started == [{"model": "m", "seed": 0, "dtype": "float32"}]
    assert trl.LLM is before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "clocate"}, "Allowed: colocate, server"),
        ({"gpu_memory": 0.5}, "Did you mean 'gpu_memory_utilization'"),
        ({"temperature": 0.5}, "rollouts.vllm has no 'temperature'"),
        ({"server_port": 8000}, "server_port has no effect with mode: colocate"),
        ({"mode": "server", "dtype": "float32"}, "a server takes it where it is started"),
        (
            {"mode": "server", "server_base_url": "http://h", "server_port": 1},
            "no effect with server_base_url",
        ),
        ({"generation_kwargs": {"temperature": 0.5, "n": 2}}, "generation_kwargs sets n, temperature"),
    ],
)
def test_arguments_of_vllm_are_checked_before_anything_loads(options, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(engine="vllm", vllm=options)


def test_every_argument_of_trls_engine_is_known():
    """One that a later TRL brings is looked at before it is let through."""
    from trl.generation.vllm_generation import VLLMGeneration

    from hpd.methods import prefixes

    ours = {"self", "model", "accelerator", "processing_class", "max_completion_length", "logprobs"}
    ours |= {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
    known = {"mode", *prefixes._RESHAPING, *prefixes._COLOCATED, *prefixes._SERVED}
    taken = set(inspect.signature(VLLMGeneration.__init__).parameters)
    assert known - {"dtype", "enforce_eager"} == taken - ours


def test_vllm_is_asked_for_with_its_extra(pair, teacher):
    with pytest.raises(ValueError, match=r"distillation\[vllm\]"):
        make(teacher, pair, engine="vllm")


def test_reshaped_log_probabilities_of_vllm_are_no_ratio():
    """TRL has vLLM return them of the distribution that it draws from, replay needs the student's own."""
    terms = choose_terms("opd", {}, ())

    def regime(**options):
        rollouts = RolloutConfig(replay=ReplayConfig(importance=True), **options)
        return choose_regime("opd", ScheduledTerms(terms).at(0.0), None, rollouts, "policy_gradient")

    for changed in ({"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.1}):
        with pytest.raises(ValueError, match="vLLM gives the log-probabilities of the distribution it drew"):
            regime(engine="vllm", **changed)
    assert regime(engine="vllm").rollouts.engine == "vllm"


# Through the trainer.


def on_policy(pair, folder, **options):
    options = {
        "method": "forward_kl",
        "prefixes": Prefixes(student=1.0),
        "rollouts": RolloutConfig(max_new_tokens=8),
        **options,
    }
    return make_trainer(pair, folder, **options)


def test_trainer_counts_the_labels_that_the_student_wrote(pair, tmp_path):
    trainer = on_policy(pair, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer.state.max_steps = 1
    batches, count = trainer.get_batch_samples(
        iter(list(trainer.get_train_dataloader())), 2, torch.device("cpu")
    )
    assert int(count) == sum(len(TokenBatch.pop(dict(b)).by_student) for b in batches)
    assert int(count) > 0


def test_on_policy_training_does_not_depend_on_accumulation(pair, tmp_path):
    whole = on_policy(pair, tmp_path / "a", max_steps=2, train=rows(16))
    split = on_policy(
        pair,
        tmp_path / "b",
        max_steps=2,
        train=rows(16),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    start = weights(whole)
    for trainer in (whole, split):
        trainer.train()
    moved = (weights(whole) - start).abs().max()
    assert (weights(whole) - weights(split)).abs().max() < 1e-3 * moved
    log = whole.state.log_history[0]
    assert log["rollouts/share"] == 1.0
    assert 0.0 <= log["rollouts/truncated"] <= 1.0
    assert log["rollouts/tokens"] > 0


def test_several_rollouts_per_prompt_stand_side_by_side(pair, tmp_path):
    config = RolloutConfig(max_new_tokens=8, num_rollouts=4)
    trainer = on_policy(pair, tmp_path, rollouts=config, train=rows(6))
    batch = first_batch(trainer)
    prompts = [tuple(row.input_ids) for row in rows_of(batch)]
    assert [prompts.count(p) for p in dict.fromkeys(prompts)] == [4, 4]
    trainer.train()
    with pytest.raises(ValueError, match="multiple of rollouts.num_rollouts"):
        on_policy(pair, tmp_path, rollouts=config, per_device_train_batch_size=6)


@pytest.mark.parametrize("strategy", ["direct", "policy_gradient"])
def test_resume_with_replay_goes_on_as_if_nothing_had_happened(pair, tmp_path, strategy):
    from helpers.trainers import _stop_at

    from hpd.methods.strategy import StrategyConfig

    replay = ReplayConfig(capacity=6, fresh=0.5, max_age_steps=4, importance=strategy == "policy_gradient")
    plan = StrategyConfig(type="policy_gradient", updates=2) if strategy == "policy_gradient" else None
    options = {
        "train": rows(24),
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 6,
        "rollouts": RolloutConfig(max_new_tokens=6, replay=replay),
        "strategy": plan,
        "method": "opd" if strategy == "policy_gradient" else "forward_kl",
        "prefixes": Prefixes(student=0.8),
    }
    straight = on_policy(pair, tmp_path / "a", **options)
    straight.train()
    first = on_policy(pair, tmp_path / "b", **options)
    first.add_callback(_stop_at(3))
    first.train()
    second = on_policy(pair, tmp_path / "b", **options)
    second.train(resume_from_checkpoint=True)
    assert torch.equal(weights(straight), weights(second))
    logs = [t.state.log_history[-2] for t in (straight, second)]
    assert logs[0]["loss"] == logs[1]["loss"]
    assert (
        straight._step.mixer.replay.state_dict() == second._step.mixer.replay.state_dict()
        or replay.importance
    )


def test_adaptive_share_rises_with_the_validation_loss_and_is_resumed(pair, tmp_path):
    share = {"schedule": "adaptive", "start": 0.2, "end": 1.0}
    options = {
        "prefixes": Prefixes(student=share, adaptive_margin=-100.0),
        "evaluation": rows(4),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 3,
        "train": rows(32),
    }
    trainer = on_policy(pair, tmp_path, **options)
    trainer.train()
    assert trainer._step.mixer.share(0.0) == pytest.approx(0.4)
    resumed = on_policy(pair, tmp_path, **{**options, "max_steps": 4})
    resumed.train(resume_from_checkpoint=True)
    assert resumed._step.mixer.share(0.0) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="follows the validation loss"):
        on_policy(pair, tmp_path, prefixes=Prefixes(student=share))


def test_evaluation_reads_the_dataset_only(pair, tmp_path):
    offline = make_trainer(pair, tmp_path / "a", method="forward_kl", evaluation=rows(6, 2))
    online = on_policy(pair, tmp_path / "b", evaluation=rows(6, 2))
    assert online.evaluate()["eval_loss"] == pytest.approx(offline.evaluate()["eval_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": 0.5, "student": 0.6}, "sum to 1.1"),
        ({"student": 1.5}, r"in \[0, 1\]"),
        ({"student": {"schedule": "linear", "start": 0.0, "end": 1.0}, "dataset": 0.5}, "give only one"),
        ({"dataset": 1.0, "continue_tokens": 4}, "has no effect"),
        ({"student": 1.0, "continue_tokens": 0}, ">= 1"),
    ],
)
def test_prefixes_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Prefixes(**options)


def test_end_tokens_join_model_and_tokenizer(pair, teacher):
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    assert tokenizer.eos_token_id in end_token_ids(teacher, tokenizer)
    assert isinstance(make(teacher, pair), StudentRollouts)


def test_distillm2_skews_follow_the_gaps(pair, tmp_path):
    trainer = make_trainer(
        pair,
        tmp_path,
        method="distillm2",
        rollouts=RolloutConfig(max_new_tokens=6),
        max_steps=4,
        train=rows(32),
    )
    trainer.train()
    skews = {name: position.t for name, position in trainer._schedule.positions.items()}
    assert set(skews) == {"skew_forward_kl.lam", "skew_reverse_kl.lam"}
    assert all(0.01 <= skew <= 0.1 for skew in skews.values())
    assert all(position._count == 4 for position in trainer._schedule.positions.values())
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all(
        log["loss"] == pytest.approx(log["loss/skew_forward_kl"] + log["loss/skew_reverse_kl"], rel=1e-4)
        for log in logs
    )
