"""Bugs of labels: which tokens are learned."""

import torch
from helpers.museum import exhibit, swap
from helpers.trainers import make_trainer
from tiny_models import tiny_tokenizer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hpd.batch import TokenBatch
from hpd.data.collator import DistillCollator
from hpd.generation import engine
from hpd.generation.settings import GenerationSettings
from hpd.generation.texts import Rollout
from hpd.methods.prefixes import Prefixes, RolloutConfig
from hpd.training.mixing import PrefixMixer

PAD = END = 9
COLLATE = DistillCollator(DataCollatorForLanguageModeling(pad_token_id=PAD))
# The longer row makes the shorter one need padding.
ROWS = [
    {"input_ids": [1, 2, 3, END], "labels": [-100, -100, 3, END]},
    {"input_ids": [1, 2, 4, 5, 6, END], "labels": [-100, -100, 4, 5, 6, END]},
]


def relabeled(change):
    """A mutant of `token_batch` that sees other labels."""

    def make(original):
        def token_batch(inputs, *rest, **named):
            return original(
                {**inputs, "labels": change(inputs["input_ids"], inputs["labels"])}, *rest, **named
            )

        return token_batch

    return lambda patch: swap(patch, "hpd.data.collator:token_batch", make)


def learned_of_the_dataset():
    """Labels of two rows whose end token also pads, and those that are right."""
    return TokenBatch.pop(COLLATE(ROWS)).labels.tolist(), [3, END, 4, 5, 6, END]


def test_end_token_that_also_pads_is_no_label():
    def without_pads(ids, labels):
        return labels.masked_fill(ids == PAD, -100)

    exhibit(learned_of_the_dataset, relabeled(without_pads))


def test_padding_is_learned():
    def copied(ids, labels):
        return torch.where((labels == -100) & (torch.arange(ids.shape[1]) > 2), ids, labels)

    exhibit(learned_of_the_dataset, relabeled(copied))


class Writer:
    """An engine that ends a rollout, and goes on with padding, as batches do."""

    def generate(self, prompts, limits, uniforms, step):
        written = [[7, 8, END, PAD, PAD][:limit] for limit in limits]
        return [
            Rollout.cut(tokens, [-1.0] * len(tokens), limit, [END])
            for tokens, limit in zip(written, limits, strict=True)
        ]


def learned_of_a_rollout():
    """Labels of a row that the student wrote, and those that are right."""
    mixer = PrefixMixer(
        Prefixes(student=1.0), RolloutConfig(max_new_tokens=5), COLLATE, Writer, seed=0, max_length=32
    )
    (batch,) = mixer([COLLATE(ROWS[:1])], 0, 0.0)
    return TokenBatch.pop(batch).labels.tolist(), [7, 8, END]


def test_students_own_end_token_is_no_label():
    def mutate(patch):
        def without_its_end(original):
            def cut(cls, tokens, logprobs, limit, end_ids):
                found = original.__func__(cls, tokens, logprobs, limit, end_ids)
                return found._replace(tokens=[token for token in found.tokens if token not in end_ids])

            return classmethod(cut)

        swap(patch, "hpd.generation.texts:Rollout.cut", without_its_end)

    exhibit(learned_of_a_rollout, mutate)


def test_what_follows_the_students_end_token_is_learned():
    def mutate(patch):
        def uncut(original):
            return classmethod(lambda cls, tokens, logprobs, limit, end_ids: cls(tokens, True, logprobs))

        swap(patch, "hpd.generation.texts:Rollout.cut", uncut)

    exhibit(learned_of_a_rollout, mutate)


def test_prompt_of_a_rollout_is_learned():
    def mutate(patch):
        def all_that_was_generated(original):
            def student_row(self, request, rollout):
                row = original(self, request, rollout)
                return {**row, "labels": row["input_ids"]}

            return student_row

        swap(patch, "hpd.training.mixing:PrefixMixer._student_row", all_that_was_generated)

    exhibit(learned_of_a_rollout, mutate)


def test_token_that_joins_prompt_and_completion_is_no_label(pair, tmp_path):
    prompt, completion = "say o", "ne two"

    def measure():
        trainer = make_trainer(pair, tmp_path, train=[{"prompt": prompt, "completion": completion}] * 8)
        found = tiny_tokenizer()(prompt + completion, return_offsets_mapping=True)
        tokens = zip(found["input_ids"], found["offset_mapping"], strict=True)
        wanted = [token if end > len(prompt) else -100 for token, (_, end) in tokens]
        return trainer.train_dataset[0]["labels"], [*wanted, tiny_tokenizer().eos_token_id]

    def mutate(patch):
        swap(patch, "trl.data_utils:common_prefix_length", lambda original: lambda prompt, whole: len(prompt))

    exhibit(measure, mutate)


def test_sequence_begins_twice(pair, tmp_path):
    tokenizer = tiny_tokenizer(leading_bos=True)
    turns = [{"role": "user", "content": "say one"}]
    answer = [{"role": "assistant", "content": "one"}]
    trainer = make_trainer(pair, tmp_path, train=[{"prompt": turns, "completion": answer}] * 8)

    def measure():
        prompt = engine.encode_prompt(tokenizer, turns, GenerationSettings())
        row = trainer.train_dataset[0]["input_ids"]
        return [ids.count(tokenizer.bos_token_id) for ids in (prompt, row)], [1, 1]

    def mutate(patch):
        def rendered_and_then_tokenized(original):
            def encode(tokenizer, prompt, settings):
                return tokenizer(tokenizer.decode(original(tokenizer, prompt, settings)))["input_ids"]

            return encode

        swap(patch, "hpd.generation.engine:encode_prompt", rendered_and_then_tokenized)

    exhibit(measure, mutate)
