"""The losses as functions: parity with public reference code, and the fused form equal to the plain one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hpd
from hpd import Head
from hpd.methods.supports import EXCLUDED_LOGPROB
from hpd.objectives import OBJECTIVES, forward_kl
from hpd.objectives.fused import FUSED

PARITY = Path(__file__).parents[1] / "parity"
ENTRIES = json.loads((PARITY / "index.json").read_text())
# Fixtures whose value is a cross-entropy: larger than the divergence by the entropy of the target.
CROSS_ENTROPIES = ("forward_kl", "symmetric_kl", "skew_forward_kl", "taid")


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["file"].removesuffix(".safetensors"))
def test_parity_with_reference_code(entry):
    fixture = load_file(PARITY / entry["file"])
    student = fixture["student_logits"].requires_grad_()
    output = hpd.distillation_loss(
        student,
        fixture["teacher_logits"],
        fixture["labels"],
        entry["objective"],
        draws=fixture.get("sampled"),
        vocabulary="shared_prefix",
        **entry["params"],
    )
    output.loss.backward()
    assert (student.grad - fixture["grad"]).norm() <= 2e-5 * fixture["grad"].norm()
    if entry["objective"] not in CROSS_ENTROPIES:
        assert output.loss.item() == pytest.approx(entry["loss"], rel=2e-5)


def batch(vocab=37, teacher_vocab=37, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, teacher_hidden = (
        torch.randn(2, 6, width, generator=generator, dtype=torch.float64) for width in (8, 12)
    )
    head, teacher_head = (
        torch.randn(v, width, generator=generator, dtype=torch.float64)
        for v, width in ((vocab, 8), (teacher_vocab, 12))
    )
    labels = torch.randint(vocab, (2, 6), generator=generator)
    labels[0, :3] = -100
    return hidden, head, teacher_hidden, teacher_head, labels


def given_draws(objective):
    """Draws for the only objective here that reads any."""
    draws = torch.randint(37, (2, 5), generator=torch.Generator().manual_seed(1))
    return {"draws": draws} if objective == "hpd" else {}


@pytest.mark.parametrize("objective", ["hpd", "forward_kl", "akl", "hpd_expected", "nll", "hpd_full"])
def test_fused_equals_plain(objective):
    hidden, head, teacher_hidden, teacher_head, labels = batch()
    hidden.requires_grad_(), head.requires_grad_()
    draws = given_draws(objective)
    plain = hpd.distillation_loss(
        hidden @ head.T, teacher_hidden @ teacher_head.T, labels, objective, **draws
    ).loss
    expected = torch.autograd.grad(plain, (hidden, head))
    fused = hpd.fused_distillation_loss(
        hidden, head, teacher_hidden, teacher_head, labels, objective, **draws
    ).loss
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(fused, (hidden, head)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_sum_is_mean_times_label_tokens_and_labels_are_shifted():
    hidden, head, teacher_hidden, teacher_head, labels = batch()
    logits = hidden @ head.T, teacher_hidden @ teacher_head.T
    mean = hpd.distillation_loss(*logits, labels, "forward_kl")
    total = hpd.distillation_loss(*logits, labels, "forward_kl", reduction="sum")
    assert int(mean.stats["tokens"]) == int((labels[:, 1:] != -100).sum()) == 8
    torch.testing.assert_close(total.loss, mean.loss * 8)
    mask = labels[:, 1:] != -100
    log_q, log_p = (x[:, :-1].log_softmax(-1)[mask] for x in logits)
    torch.testing.assert_close(mean.loss, (log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_parameters_reach_objective_and_term():
    hidden, head, teacher_hidden, teacher_head, labels = batch()
    logits = hidden @ head.T, teacher_hidden @ teacher_head.T
    warm = hpd.distillation_loss(*logits, labels, "generalized_jsd", beta=0.3, temperature=2.0).loss
    by_hand = hpd.distillation_loss(logits[0] / 2, logits[1] / 2, labels, "generalized_jsd", beta=0.3).loss
    torch.testing.assert_close(warm, by_hand)
    top = hpd.distillation_loss(*logits, labels, "reverse_kl", support="top_k", top_k=5).loss
    assert 0 < top < hpd.distillation_loss(*logits, labels, "reverse_kl").loss


@pytest.mark.parametrize(
    "name", ["forward_kl", "reverse_kl", "hpd", "hpd_expected", "hpd_full", "nll", "todi", "akl"]
)
@pytest.mark.parametrize("form", ["instance", "factory", "path"])
def test_an_objective_is_its_name(name, form):
    factory = OBJECTIVES[name]
    given = {"instance": factory(), "factory": factory, "path": f"hpd.objectives:{name}"}[form]
    hidden, head, teacher_hidden, teacher_head, labels = batch()
    hidden.requires_grad_(), head.requires_grad_()
    draws = given_draws(name)

    def by(objective):
        logits = hidden @ head.T, teacher_hidden @ teacher_head.T
        plain = hpd.distillation_loss(*logits, labels, objective, **draws)
        fused = hpd.fused_distillation_loss(
            hidden, head, teacher_hidden, teacher_head, labels, objective, **draws
        )
        gradients = [torch.autograd.grad(output.loss, (hidden, head)) for output in (plain, fused)]
        return [plain.loss, fused.loss, *gradients[0], *gradients[1], *plain.stats.values()]

    for got, want in zip(by(given), by(name), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("given", [forward_kl(), forward_kl, "hpd.objectives:forward_kl", "forward_kl"])
def test_every_form_of_an_objective_takes_the_fast_way(given, monkeypatch):
    calls = []
    fused = FUSED["forward_kl"]
    monkeypatch.setitem(FUSED, "forward_kl", lambda whole: (calls.append(len(whole.labels)), fused(whole))[1])
    hidden, head, teacher_hidden, teacher_head, labels = batch()
    hpd.fused_distillation_loss(hidden, head, teacher_hidden, teacher_head, labels, given)
    assert calls == [8]


def test_exact_draws_of_an_instance():
    hidden, head, teacher_hidden, teacher_head, labels = batch()
    logits = hidden @ head.T, teacher_hidden @ teacher_head.T
    by_name = hpd.distillation_loss(*logits, labels, "hpd", draws="exact", reinforce=False).loss
    instance = OBJECTIVES["hpd"](reinforce=False)
    assert torch.equal(hpd.distillation_loss(*logits, labels, instance, draws="exact").loss, by_name)


def test_fresh_draws_come_from_the_generator():
    hidden, head, teacher_hidden, teacher_head, labels = batch()

    def loss(seed):
        generator = torch.Generator().manual_seed(seed)
        return hpd.fused_distillation_loss(
            hidden, head, teacher_hidden, teacher_head, labels, "hpd", generator=generator
        ).loss

    assert loss(0) == loss(0) != loss(1)


def test_exact_draws_are_the_expectation_over_the_draw():
    hidden, head, teacher_hidden, teacher_head, labels = batch(vocab=5, teacher_vocab=5)
    logits = hidden @ head.T, teacher_hidden @ teacher_head.T
    exact = hpd.distillation_loss(*logits, labels, "hpd", draws="exact").loss
    torch.testing.assert_close(exact, hpd.distillation_loss(*logits, labels, "hpd_expected").loss)
    # One position, so that the expectation is a sum over five draws.
    labels = torch.full((1, 2), -100)
    labels[0, 1] = 3
    one = [x[:1, :2] for x in logits]
    probs = one[0][0, 0].softmax(-1)
    sampled = [hpd.distillation_loss(*one, labels, "hpd", draws=torch.tensor([[a]])).loss for a in range(5)]
    expected = sum(p * loss for p, loss in zip(probs, sampled, strict=True))
    torch.testing.assert_close(hpd.distillation_loss(*one, labels, "hpd", draws="exact").loss, expected)


def test_importance_weighted_draws_do_not_depend_on_their_number():
    hidden, head, teacher_hidden, teacher_head, labels = batch()
    logits = hidden @ head.T, teacher_hidden @ teacher_head.T
    draws = torch.randint(37, (2, 5), generator=torch.Generator().manual_seed(1))
    once = hpd.distillation_loss(*logits, labels, "hpd", draws=draws, importance=True)
    thrice = hpd.distillation_loss(
        *logits, labels, "hpd", draws=draws[..., None].expand(2, 5, 3), importance=True, num_samples=3
    )
    torch.testing.assert_close(once.loss, thrice.loss)
    assert once.loss != hpd.distillation_loss(*logits, labels, "hpd", draws=draws).loss


def test_shared_prefix_drops_labels_beyond():
    hidden, head, teacher_hidden, teacher_head, labels = batch(vocab=37, teacher_vocab=30)
    given = hidden, head, teacher_hidden, teacher_head, labels
    output = hpd.fused_distillation_loss(*given, "forward_kl", vocabulary="shared_prefix")
    with pytest.warns(DeprecationWarning, match="called vocabulary"):
        assert hpd.fused_distillation_loss(*given, "forward_kl", vocab="shared_prefix").loss == output.loss
    assert int(output.stats["tokens"]) == int(((labels[:, 1:] != -100) & (labels[:, 1:] < 30)).sum())


def test_head_extras_are_honored():
    hidden, head, teacher_hidden, teacher_head, labels = batch()
    bias = torch.linspace(-1, 1, 37, dtype=torch.float64)
    capped = 5.0 * torch.tanh(0.3 * (hidden @ head.T + bias) / 5.0)
    plain = hpd.distillation_loss(capped, teacher_hidden @ teacher_head.T, labels, "forward_kl").loss
    fused = hpd.fused_distillation_loss(
        hidden, Head(head, bias, scale=0.3, softcap=5.0), teacher_hidden, teacher_head, labels, "forward_kl"
    ).loss
    torch.testing.assert_close(fused, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "hdp"}, "Did you mean 'hpd'"),
        ({"objective": "akl", "nu": 1}, "no parameter 'nu'"),
        ({"objective": forward_kl(), "build": 1}, "'forward_kl' has no parameter 'build'"),
        ({"objective": "nowhere:akl"}, "cannot be imported"),
        ({"reduction": "none"}, "reduction must be one of mean, sum"),
        ({}, "37 tokens and the teacher 30"),
        ({"vocabulary": "error"}, "37 tokens and the teacher 30"),
        ({"vocabulary": "cut"}, "vocabulary must be one of"),
    ],
)
def test_mistakes_are_named(options, message):
    hidden, head, teacher_hidden, teacher_head, labels = batch(teacher_vocab=30)
    with pytest.raises(ValueError, match=message):
        hpd.distillation_loss(hidden @ head.T, teacher_hidden @ teacher_head.T, labels, **options)


def test_unequal_shapes_are_named(monkeypatch):
    # The tests' type checker would catch these first; a user's call has none.
    from jaxtyping import config as jaxtyping_config

    hidden, head, teacher_hidden, teacher_head, labels = batch()
    student, teacher = hidden @ head.T, teacher_hidden @ teacher_head.T
    monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="same B and T"):
        hpd.distillation_loss(student[:, :4], teacher, labels)
    with pytest.raises(ValueError, match=r"\[B, T-1\]"):
        hpd.distillation_loss(student, teacher, labels, draws=torch.zeros(2, 6, dtype=torch.long))


@pytest.mark.parametrize("label", [37, 1000, -1])
@pytest.mark.parametrize("vocabulary", ["error", "shared_prefix"])
def test_a_label_that_is_no_token_is_refused(label, vocabulary):
    hidden, head, teacher_hidden, teacher_head, labels = batch()
    labels[0, 3] = label
    with pytest.raises(ValueError, match=f"Label {label} is not a token: the vocabulary has 37"):
        hpd.distillation_loss(
            hidden @ head.T, teacher_hidden @ teacher_head.T, labels, "forward_kl", vocabulary=vocabulary
        )


def test_shapes_are_compared_whole(monkeypatch):
    from jaxtyping import config as jaxtyping_config

    monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)
    hidden, head, teacher_hidden, teacher_head, labels = batch()
    student, teacher = hidden @ head.T, teacher_hidden @ teacher_head.T
    assert tuple(labels.shape) == (2, 6)
    # As many positions as before, in other rows.
    with pytest.raises(ValueError, match=r"labels are \(2, 6\) and the teacher's .* \(3, 4, 37\)"):
        hpd.distillation_loss(student, teacher.reshape(3, 4, 37), labels)
    with pytest.raises(ValueError, match="labels are \\[B, T\\]"):
        hpd.distillation_loss(student, teacher, labels.flatten())
    with pytest.raises(ValueError, match="last dimensions must be equal"):
        hpd.fused_distillation_loss(hidden, head.T, teacher_hidden, teacher_head, labels)


def test_labels_and_draws_are_token_ids(monkeypatch):
    from jaxtyping import config as jaxtyping_config

    monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)
    hidden, head, teacher_hidden, teacher_head, labels = batch()
    student, teacher = hidden @ head.T, teacher_hidden @ teacher_head.T
    with pytest.raises(ValueError, match=r"labels are token ids, .* torch.float32"):
        hpd.distillation_loss(student, teacher, labels.float())
    draws = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"draws are token ids, .* torch.float32"):
        hpd.distillation_loss(student, teacher, labels, draws=draws.float())
    where = (labels[:, 1:] != -100).nonzero()[0]
    draws[where[0], where[1]] = 37
    with pytest.raises(ValueError, match="Draw 37 is not a token: the vocabulary has 37"):
        hpd.distillation_loss(student, teacher, labels, draws=draws)


# f_divergence is left out: its f is the caller's own.
NEEDED = {"abkd": {"alpha": 0.5, "beta": 0.5}, "js": {"lam": 0.5}, "taid": {"t": 0.4}}


@pytest.mark.parametrize("objective", sorted(OBJECTIVES.keys() - {"f_divergence"}))
@pytest.mark.parametrize("mask", [-torch.inf, torch.finfo(torch.float32).min, -1e9, -1e4])
def test_a_token_that_the_teacher_excludes_has_a_bounded_gradient(objective, mask):
    """Where p is 0, the weight of a reverse KL is q (log p - log q - 1) with log p = -104; the gradient of a
    logit is q (sum of the weights) minus its own."""
    torch.manual_seed(0)
    student = torch.randn(1, 4, 7, requires_grad=True)
    teacher = torch.randn(1, 4, 7)
    teacher[..., 2:4] = mask
    labels = torch.tensor([[0, 1, 0, 6]])
    given = NEEDED.get(objective, {})
    found = hpd.distillation_loss(student, teacher, labels, objective, reduction="sum", **given)
    found.loss.backward()
    assert torch.isfinite(found.loss)
    assert torch.isfinite(student.grad).all()
    # Two excluded tokens, each weight within (104 - log q + 1) q, as much again through the others' share.
    assert student.grad.abs().max() < 2 * 110
    if objective != "reverse_kl":
        return
    log_q = student.detach()[:, :-1].log_softmax(-1)
    log_p = teacher[:, :-1].log_softmax(-1).masked_fill(teacher[:, :-1] == mask, EXCLUDED_LOGPROB)
    q = log_q.exp()
    weights = q * (log_p - log_q - 1)
    expected = q * weights.sum(-1, keepdim=True) - weights
    torch.testing.assert_close(student.grad[:, :-1], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss.detach(), (q * (log_q - log_p)).sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_stats_are_means_per_token(reduction):
    hidden, head, teacher_hidden, teacher_head, labels = batch()
    logits = hidden @ head.T, teacher_hidden @ teacher_head.T
    stats = hpd.distillation_loss(*logits, labels, "forward_kl", reduction=reduction).stats
    mask = labels[:, 1:] != -100
    log_q, log_p = (x[:, :-1].log_softmax(-1)[mask] for x in logits)
    expected = {
        "forward_kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
        "student_entropy": -(log_q.exp() * log_q).sum(-1).mean(),
        "top1_agreement": (log_q.argmax(-1) == log_p.argmax(-1)).double().mean(),
        "tokens": torch.tensor(8.0, dtype=torch.float64),
        "metric_tokens": torch.tensor(8.0, dtype=torch.float64),
    }
    for name, value in expected.items():
        torch.testing.assert_close(stats[name].double(), value, msg=lambda m, name=name: f"{name}: {m}")


def test_a_batch_without_labels_is_a_zero_with_finite_stats():
    hidden, head, teacher_hidden, teacher_head, labels = batch()
    output = hpd.distillation_loss(
        hidden @ head.T, teacher_hidden @ teacher_head.T, torch.full_like(labels, -100), "forward_kl"
    )
    assert output.loss == 0
    assert all(torch.isfinite(value) for value in output.stats.values())


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_linear_layer_is_a_head(has_bias):
    hidden, head, teacher_hidden, teacher_head, labels = batch()
    linear = torch.nn.Linear(head.shape[1], len(head), bias=has_bias, dtype=head.dtype)
    with torch.no_grad():
        linear.weight.copy_(head)
    plain = hpd.distillation_loss(linear(hidden), teacher_hidden @ teacher_head.T, labels, "forward_kl").loss
    expected = torch.autograd.grad(plain, list(linear.parameters()))
    fused = hpd.fused_distillation_loss(
        hidden, linear, teacher_hidden, teacher_head, labels, "forward_kl"
    ).loss
    torch.testing.assert_close(fused, plain)
    for ours, theirs in zip(torch.autograd.grad(fused, list(linear.parameters())), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_another_module_is_no_head(monkeypatch):
    from jaxtyping import config as jaxtyping_config

    monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)
    hidden, _, teacher_hidden, teacher_head, labels = batch()
    with pytest.raises(ValueError, match=r"student's head is a Sequential.*head_of\(model\)"):
        hpd.fused_distillation_loss(hidden, torch.nn.Sequential(), teacher_hidden, teacher_head, labels)


def test_every_objective_of_the_table_has_a_default_support():
    from hpd import TermConfig

    needed = {"js": {"lam": 0.1}, "abkd": {"alpha": 0.2, "beta": 0.7}, "taid": {"t": 0.5}}
    for name in OBJECTIVES:
        if name != "f_divergence":
            TermConfig(objective=name, kwargs=needed.get(name, {})).build()
