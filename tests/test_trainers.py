"""The seams with TRL's trainers: what they change in a step and in an evaluation, and what they leave as it is."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from alignlab.models.pretrain import tokenizer
from alignlab.recipe.load import ToySection
from alignlab.train.trainers import AlignSFTTrainer, longest_first

HIDDEN, VOCABULARY = 32, 5000  # more words than a tile of the head has
LENGTHS = [(4, 3), (20, 5), (2, 9), (11, 1), (7, 7)]  # tokens of prompts and replies


@pytest.fixture(scope="module")
def words():
    return tokenizer(ToySection(pairs=8))


@pytest.fixture(scope="module")
def rows() -> Dataset:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, 1000, (sum(both),), generator=draw).tolist() for both in LENGTHS]
    labels = [[-100] * prompt + row[prompt:] for row, (prompt, _) in zip(ids, LENGTHS, strict=True)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


@pytest.fixture
def make_trainer(rows, words, tmp_path):
    def make(kind: type[SFTTrainer]) -> SFTTrainer:
        torch.manual_seed(0)
        shape = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **shape))
        how = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
        how |= {"per_device_eval_batch_size": 2, "dataset_kwargs": {"skip_prepare_dataset": True}}
        args = SFTConfig(output_dir=str(tmp_path), **how)
        return kind(model, args, train_dataset=rows, eval_dataset=rows, processing_class=words)

    return make


def step(trainer: SFTTrainer, rows: Dataset) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients, and the multiplications of the forward."""
    batch = trainer._prepare_inputs(trainer.data_collator(rows.to_list()))
    with FlopCounterMode(display=False) as forward:
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {name: weight.grad for name, weight in trainer.model.named_parameters()}
    return loss.item(), gradients, forward.get_total_flops()


def test_the_head_sees_reply_tokens_only_and_the_loss_is_trls(make_trainer, rows):
    """Five rows of 25 tokens as padded: 5 × 24 predictions, of which 3 + 5 + 9 + 1 + 7 = 25 are of reply tokens."""
    ours, theirs = (step(make_trainer(kind), rows) for kind in (AlignSFTTrainer, SFTTrainer))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-4, atol=1e-7, msg=name)
    assert theirs[2] - ours[2] == 2 * HIDDEN * VOCABULARY * (5 * 24 - 25)


def test_rows_without_a_reply_token_give_a_loss_of_zero(make_trainer, rows):
    alone = Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[-100] * 3]})
    loss, gradients, _ = step(make_trainer(AlignSFTTrainer), alone)
    assert loss == 0 and all(not gradient.any() for gradient in gradients.values() if gradient is not None)


def test_held_out_rows_come_longest_first_and_the_figures_are_those_of_any_order(make_trainer, rows):
    """Lengths 25, 14, 12, 11, 7 in batches of two; padded in the order of the rows it would be 25, 25, 12, 12, 14."""
    trainer = make_trainer(AlignSFTTrainer)
    assert longest_first(rows, ("input_ids",)) == [1, 4, 3, 2, 0]
    assert [batch["input_ids"].shape for batch in trainer.get_eval_dataloader()] == [(2, 25), (2, 12), (1, 7)]
    found = trainer.evaluate()
    total = 0.0
    for row, (prompt, _) in zip(rows, LENGTHS, strict=True):
        ids = torch.tensor(row["input_ids"])
        with torch.no_grad():
            logps = trainer.model(ids[None]).logits[0, :-1].log_softmax(-1)
        total -= logps.gather(-1, ids[1:, None])[prompt - 1 :].sum().item()
    assert found["eval_loss"] == pytest.approx(total / sum(reply for _, reply in LENGTHS), rel=1e-5)
