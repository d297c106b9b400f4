"""Self-distillation with a context of the teacher's own (opsd, sdft), and the student's moving average."""

import itertools

import pytest
import torch
from helpers.trainers import first_batch, gradient, make_trainer, rows, weights
from peft import LoraConfig
from tiny_models import tiny_pair
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hpd.config import load_recipe
from hpd.config.models import TeacherConfig
from hpd.losses import Head, Scores
from hpd.methods.prefixes import Prefixes, RolloutConfig
from hpd.methods.table import METHODS
from hpd.teachers import MixtureTeacher, SelfTeacher, Teacher

OWN = ("opsd", "sdft")
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair("llama", tmp_path_factory.mktemp("pair"))


def hinted(given):
    return [
        {**row, "teacher_prompt": f"answer {i}:{row['completion']}. {row['prompt']}"}
        for i, row in enumerate(given)
    ]


class Watch(TrainerCallback):
    """What was trained, and the teacher's copy, before training and after each step."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.seen = [self.now()]

    def now(self):
        pairs = self.trainer.teacher._pairs()
        return [[tensor.double().clone() for tensor in side] for side in zip(*pairs, strict=True)]

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self.now())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_average_has_its_closed_form(pair, tmp_path, lora, rate):
    """After n steps (1 - r)^n theta_0 + r sum_k (1 - r)^(n - k) theta_k, from the students on the way."""
    steps = 3
    trainer = make_trainer(
        pair, tmp_path, teacher=SelfTeacher(rate), method="forward_kl", train=hinted(rows()),
        max_steps=steps, learning_rate=0.5, peft_config=LoraConfig(**LORA) if lora else None,
    )  # fmt: skip
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    averages, students = zip(*watch.seen, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(averages[0], students[0], strict=True))
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert [a.shape for a in averages[0]] == [p.shape for p in trained]
    for number, found in enumerate(averages[-1]):
        expected = (1 - rate) ** steps * students[0][number]
        for k in range(1, steps + 1):
            expected = expected + rate * (1 - rate) ** (steps - k) * students[k][number]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    moved = sum(float((a - b).norm()) for a, b in zip(averages[0], averages[-1], strict=True))
    assert moved > 1e-3


def test_average_of_an_adapter_shares_the_base(pair, tmp_path):
    trainer = make_trainer(
        pair, tmp_path, teacher=SelfTeacher(0.5), method="forward_kl", train=hinted(rows()),
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    copied = dict(trainer.teacher._copy.model.named_parameters())
    for name, weight in trainer.model.named_parameters():
        assert (copied[name] is weight) == (not weight.requires_grad)
        assert not copied[name].requires_grad


def test_loss_is_measured_against_the_average(pair, tmp_path):
    """A student that has moved, and its average of rate 1 and of rate 0.5, on rows read alike."""
    losses = {}
    for rate in (1.0, 0.5, None):
        trainer = make_trainer(
            pair, tmp_path / str(rate), teacher=SelfTeacher(rate), method="forward_kl", train=rows()
        )
        batch = first_batch(trainer)
        with torch.no_grad():
            for weight in trainer.model.parameters():
                weight.mul_(1.5)
            if rate is not None:
                trainer.teacher.follow()
        losses[rate] = float(trainer.compute_loss(trainer.model.train(), dict(batch)).detach())
    assert losses[1.0] == pytest.approx(0.0, abs=1e-6)
    assert losses[1.0] < losses[0.5] < losses[None]


def test_a_resumed_run_goes_on_with_its_average(pair, tmp_path):
    options = {
        "method": "forward_kl", "train": hinted(rows(16)), "per_device_train_batch_size": 4,
        "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.3,
    }  # fmt: skip
    whole = make_trainer(pair, tmp_path / "a", teacher=SelfTeacher(0.2), max_steps=4, **options)
    whole.train()
    again = make_trainer(pair, tmp_path / "a", teacher=SelfTeacher(0.2), max_steps=4, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(weights(again), weights(whole))
    averages = [[a for a, _ in trainer.teacher._pairs()] for trainer in (again, whole)]
    assert all(torch.equal(a, b) for a, b in zip(*averages, strict=True))


def test_parts_of_a_mixture_follow_too(pair, tmp_path):
    teacher = MixtureTeacher({"old": SelfTeacher(), "now": SelfTeacher(1.0)}, {"old": 1.0, "now": 1.0})
    trainer = make_trainer(pair, tmp_path, teacher=teacher, method="forward_kl", max_steps=2, train=rows())
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.mul_(2)
    trainer.train()
    now, old = (teacher.teachers[name]._copy.model.get_output_embeddings().weight for name in ("now", "old"))
    assert torch.equal(now, trainer.model.get_output_embeddings().weight)
    assert not torch.equal(old, now)
    assert set(teacher.state_dict()) == {"now"}


class Hinted(Teacher):
    """The student's own distribution, as SelfTeacher would give it, but for the first token of the answer,
    which it copies from the hint that its prompt begins with, as far as 1 - EPSILON."""

    EPSILON = 0.2

    def __init__(self, vocab):
        self.vocab = vocab

    def scores(self, inputs, batch):
        found = []
        width = inputs["input_ids"].shape[1]
        for index in batch.index.tolist():
            row, place = divmod(index, width)
            ids = inputs["input_ids"][row, : place + 1].tolist()
            p = torch.full((self.vocab,), 1.0 / self.vocab)
            if len(ids) - 1 == ids.index(self.colon):
                p = p * self.EPSILON
                p[ids[0]] += 1.0 - self.EPSILON
            found.append(p)
        return Scores(torch.stack(found).log(), Head(None))


@pytest.mark.parametrize("method", OWN)
def test_copy_the_hint_is_learned_as_its_enumeration_says(tmp_path, tmp_path_factory, method):
    """One token, three hints, the same student's prompt: the gradient is the mean over hints of the method's
    divergence, which is written out here in float64 with its cap."""
    pair = tiny_pair("qwen2", tmp_path_factory.mktemp("pair"))
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    hints = [tokenizer(letter)["input_ids"][0] for letter in "abc"]
    given = [{"prompt": "x:", "completion": "b", "teacher_prompt": f"{letter}:"} for letter in "abc"]
    teacher = Hinted(300)
    teacher.colon = tokenizer(":")["input_ids"][0]
    trainer = make_trainer(
        pair, tmp_path, method=method, train=given, teacher=teacher, prefixes=Prefixes(dataset=1.0)
    )
    loss, grad = gradient(trainer)
    student = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float64).eval()
    ids = [*tokenizer("x:b")["input_ids"], tokenizer.eos_token_id]
    log_q = torch.log_softmax(student(input_ids=torch.tensor([ids])).logits[0, -3:-1], -1)
    total = torch.zeros((), dtype=torch.float64)
    for hint, place in itertools.product(hints, range(2)):
        p = torch.full((300,), 1.0 / 300, dtype=torch.float64)
        if place == 0:
            p = p * Hinted.EPSILON
            p[hint] += 1.0 - Hinted.EPSILON
        q = log_q[place].exp()
        if method == "opsd":
            parts = p * (p.log() - log_q[place])
            assert (place == 0) == bool(parts[hint] > 0.05)
            total = total + parts.clamp_max(0.05).sum()
        else:
            total = total + (q * (log_q[place] - p.log())).sum()
    (total / 6).backward()
    assert loss == pytest.approx(float(total.detach()) / 6, rel=1e-5)
    expected = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert (grad.double() - expected).norm() < 2e-5 * expected.norm()


@pytest.mark.parametrize("method", OWN)
def test_without_more_in_the_teachers_prompt_it_is_the_loss_of_the_same_prompt(pair, tmp_path, method):
    """One row has more for the teacher; batches without it have the loss of the method's terms, bit for
    bit."""
    given = [
        {**row, "teacher_prompt": ("now " if i == 5 else "") + row["prompt"]} for i, row in enumerate(rows())
    ]
    ours = make_trainer(pair, tmp_path / "a", method=method, train=given, prefixes=Prefixes(dataset=1.0),
                        per_device_train_batch_size=2)  # fmt: skip
    plain = make_trainer(pair, tmp_path / "b", method=None, terms=METHODS[method].terms, train=rows(),
                         per_device_train_batch_size=2)  # fmt: skip
    equal = []
    for batch, other in zip(ours.get_train_dataloader(), plain.get_train_dataloader(), strict=True):
        found, expected = gradient(ours, [batch]), gradient(plain, [other])
        equal.append(found[0] == expected[0] and torch.equal(found[1], expected[1]))
    assert equal == [True, True, False, True]


@pytest.mark.parametrize("method", OWN)
def test_the_rows_train_on_what_the_student_writes(pair, tmp_path, method):
    trainer = make_trainer(
        pair, tmp_path, method=method, teacher=SelfTeacher(0.5 if method == "sdft" else None),
        train=hinted(rows()), max_steps=2, rollouts=RolloutConfig(max_new_tokens=6), optim="adamw_torch",
    )  # fmt: skip
    before = weights(trainer).clone()
    trainer.train()
    assert not torch.equal(weights(trainer), before)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    # The same model with more in its prompt: not the student.
    assert all(log["reverse_kl"] > 1e-5 for log in logs)


def test_rows_without_a_prompt_for_the_teacher_are_refused(pair, tmp_path):
    with pytest.raises(ValueError, match="method: opsd learns from a teacher that reads what the student"):
        make_trainer(pair, tmp_path, method="opsd", train=rows(), teacher="self")


RECIPE = {
    "student": "some/model",
    "teacher": {"type": "self", "ema": 0.02, "prompt": "{prompt} {completion}"},
    "method": "sdft",
    "data": {"path": "rows.jsonl"},
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["teacher.ema=0"], r"teacher.ema must be in \(0, 1\], or null, got 0"),
        (["teacher.ema=1.5"], r"teacher.ema must be in"),
        (["teacher.type=model", "teacher.model=x"], "teacher.ema is for type self"),
        (["teacher.prompt=null"], "method: sdft learns from a teacher that reads what the student does not"),
        (["student.dtype=bfloat16"], "would round its small steps away"),
        (["cache.path=here"], "remove ema, or cache"),
        (["method_kwargs.cap=0.0"], "cap = 0"),
        (["method=hpd", "method_kwargs.cap=0.1"], "cap bounds what each token adds"),
    ],
)
def test_recipes_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        load_recipe(RECIPE, changes)


def test_recipe_says_what_the_rows_are():
    recipe = load_recipe(RECIPE)
    assert recipe.choose_regime().needs_prompts_only
    assert TeacherConfig(type="self", ema=0.1).title == "its own moving average"
    capped = load_recipe(RECIPE, ["method=opsd", "teacher.ema=null", "method_kwargs.cap=0.2"])
    assert [term.cap for term in capped.choose_terms()] == [0.2]


def test_trained_weights_in_low_precision_are_refused(pair, tmp_path):
    student = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="needs trained weights in float32"):
        SelfTeacher(0.1).prepare(student, make_trainer(pair, tmp_path, train=rows()).accelerator)
    with pytest.raises(ValueError, match="ema = 2"):
        SelfTeacher(2)
