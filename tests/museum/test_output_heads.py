"""Bugs of fused losses: what lies between hidden states and logits, and what follows the loss."""

import pytest
import torch
from helpers.museum import exhibit, swap
from helpers.trainers import first_batch, make_trainer
from peft import LoraConfig
from torch import nn
from torch.distributions import Categorical, kl_divergence
from transformers import AutoConfig, AutoModelForCausalLM

from hpd.losses import Head
from hpd.losses.functional import distillation_loss, fused_distillation_loss
from hpd.losses.heads import head_of
from hpd.losses.products import logits
from hpd.models.forward import add_head_function, scores_of

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def tiny(architecture: str, **settings) -> nn.Module:
    """A random model of a family."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )
    return add_head_function(AutoModelForCausalLM.from_config(config).eval())


def own_and_ours(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits as the operator computes them, and the model's own."""
    index = torch.arange(IDS.shape[1])
    with torch.no_grad():
        own = model(input_ids=IDS).logits[0]
        return logits(scores_of(model, {"input_ids": IDS}, index)), own


def test_cap_of_the_logits_is_left_out():
    model = tiny("gemma2", head_dim=8, final_logit_softcapping=3.0, query_pre_attn_scalar=8)

    def mutate(patch):
        swap(patch, "hpd.losses.heads:head_of", lambda original: lambda m: original(m)._replace(softcap=None))

    exhibit(lambda: own_and_ours(model), mutate)


@pytest.mark.parametrize("family", ["cohere", "granite"])
def test_scale_of_the_logits_is_left_out(family):
    scale = {"logit_scale": 0.0625} if family == "cohere" else {"logits_scaling": 8.0}
    model = tiny(family, **scale)

    def mutate(patch):
        swap(patch, "hpd.losses.heads:logit_scale", lambda original: lambda config: 1.0)

    exhibit(lambda: own_and_ours(model), mutate)


def test_scale_of_the_logits_is_left_out_of_the_gradient():
    model = tiny("granite", logits_scaling=8.0)
    head = head_of(model)
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = torch.randn(2, 5, 16, generator=generator), torch.randn(2, 5, 40, generator=generator)
    labels = torch.zeros(2, 5, dtype=torch.int64)

    def gradient(through):
        leaf = hidden.clone().requires_grad_()
        through(leaf).backward()
        return leaf.grad

    def fused(leaf):
        return fused_distillation_loss(leaf, head, teacher, Head(torch.eye(40)), labels, "forward_kl").loss

    def plain(leaf):
        sides = (Categorical(logits=side[:, :-1]) for side in (teacher, model.lm_head(leaf) / 8.0))
        return kl_divergence(*sides).mean()

    def measure():
        return gradient(fused), gradient(plain)

    def mutate(patch):
        swap(
            patch,
            "hpd.losses.products:accumulate",
            lambda original: lambda gradient, *rest: original(gradient / head.scale, *rest),
        )

    exhibit(measure, mutate)


def test_adapter_of_the_head_is_left_out(pair, tmp_path):
    lora = LoraConfig(
        r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    trainer = make_trainer(pair, tmp_path, method="forward_kl", peft_config=lora)
    batch = first_batch(trainer)

    def measure():
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model.train(), dict(batch)).backward()
        trained = [p for name, p in trainer.model.named_parameters() if "lm_head.lora" in name]
        got = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in trained])
        # The same through the model's own head, whose adapter peft applies.
        z = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        with torch.no_grad():
            p = trainer.teacher.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits
        loss = distillation_loss(z, p, batch["labels"], "forward_kl").loss
        return got, torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])

    def mutate(patch):
        def frozen_base(original):
            return lambda module: (getattr(module, "base_layer", module).weight, None)

        swap(patch, "hpd.losses.heads:_effective_weight", frozen_base)

    exhibit(measure, mutate, tolerance=1e-4)


def test_what_follows_the_loss_does_not_reach_the_gradient():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, 6, 9, dtype=torch.float64, generator=generator)
    student.requires_grad_()
    labels = torch.zeros(1, 6, dtype=torch.int64)

    def loss():
        return distillation_loss(student, teacher, labels, "reverse_kl").loss

    def measure():
        scaled = torch.autograd.grad((0.25 * loss()) ** 2, student)[0]
        return scaled, 0.125 * loss().detach() * torch.autograd.grad(loss(), student)[0]

    def mutate(patch):
        def as_if_it_came_last(original):
            def backward(ctx, grad_output):
                return original.__func__(ctx, torch.ones_like(grad_output))

            return staticmethod(backward)

        swap(patch, "hpd.losses.chunked:ReweightedNLL.backward", as_if_it_came_last)

    exhibit(measure, mutate)
