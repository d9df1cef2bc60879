"""What the product promises, measured: the embedded default learns, its control does not, and real HH-RLHF trains."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from alignlab.recipe.load import load_recipe
from alignlab.runs.run import Figures, Run
from alignlab.train.stages import train_dpo

pytestmark = pytest.mark.slow

REAL = """
about: a 0.3 M parameter model on real HH-RLHF rows
data: {{source: hh-rlhf, path: {data}, subset: helpful-base, max_prompt_tokens: 96, max_reply_tokens: 320}}
model: {{name: {model}, dtype: float32, lora: {{r: 16, target_modules: all-linear}}}}
sft: {{max_steps: 40, learning_rate: 2.0e-3, per_device_eval_batch_size: 32, logging_steps: 10, eval_steps: 40}}
dpo:
  max_steps: 45
  learning_rate: 5.0e-4
  per_device_train_batch_size: 16
  per_device_eval_batch_size: 32
  logging_steps: 15
  eval_steps: 45
monitor: {{kl: {{prompts: 8, max_new_tokens: 16}}}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Where runs of `tiny` are, which start from the same SFT run."""
    return tmp_path_factory.mktemp("results")


def test_tiny_learns_what_is_preferred(root):
    """On test topics, over 250 pairs, on any CPU: well below the spread over seeds that docs/results.md has."""
    run = train_dpo(load_recipe("tiny"), root=root)
    test = run.manifest.test
    show("tiny", test)
    assert test.accuracy.mean >= 0.8
    assert test.margin.mean >= 0.3
    assert test.win_rate.mean - test.win_rate.stderr > 0.5
    assert test.kl < 10 and test.perplexity / test.reference_perplexity < 1.1


def test_with_shuffled_labels_both_vanish(root):
    """Labels drawn by a coin: within three standard errors of an accuracy of 0.5, and a margin a tenth of tiny's."""
    run = train_dpo(load_recipe("tiny", ["data.toy.shuffled=true", "dpo.max_steps=100"]), root=root)
    test = run.manifest.test
    show("shuffled", test)
    assert abs(test.accuracy.mean - 0.5) < 3 * test.accuracy.stderr + 0.05
    assert abs(test.margin.mean) < 0.15


HOT = [
    "dpo.loss_type=sigmoid",
    "dpo.learning_rate=5e-3",
    "monitor.patience=null",
    "monitor.max_kl=10",
]


def test_a_run_that_collapses_is_stopped_with_a_checkpoint_that_has_not(root):
    """Ten times tiny's learning rate, without the SFT term: let run, KL passes 50 nats with accuracy above 0.9.

    Stopped by the guard, the same run keeps a checkpoint below the limit whose replies win by the toy's rule.
    """
    free = train_dpo(load_recipe("tiny", [*HOT, "dpo.eval_steps=40"]), root=root, name="free").manifest
    show("collapsed", free.test)
    assert free.test.kl > 50 and free.test.accuracy.mean > 0.9
    assert free.test.win_rate.mean < 0.5
    assert "kl" in [warning.guard for warning in free.warnings]
    guarded = [*HOT, "dpo.eval_steps=10", "monitor.action=stop"]
    stopped = train_dpo(load_recipe("tiny", guarded), root=root, name="stopped").manifest
    show("stopped", stopped.test)
    assert "kept the best checkpoint inside the limits" in stopped.stop_reason
    assert stopped.test.kl < 10 and stopped.test.win_rate.mean > 0.5


@pytest.mark.parametrize("base", ["stories260K", "fresh"])
def test_real_dialogues_train_a_real_model(base, shared: Path, tmp_path):
    """SFT and DPO on helpful-base: finite losses, a lower perplexity, and a held-out margin above zero.

    What so small a model can learn of real preferences is little more than that longer replies win 59 % of the time.
    """
    model = shared / "models" / "stories260K" if base == "stories260K" else fresh_model(shared, tmp_path)
    recipe = tmp_path / f"{base}.yaml"
    recipe.write_text(REAL.format(data=shared / "data" / "hh-rlhf", model=model))
    run = train_dpo(load_recipe(str(recipe)), root=tmp_path)
    losses = [row[key] for row in run.metrics() for key in ("train/loss", "eval/loss") if key in row]
    assert losses and all(map(math.isfinite, losses))
    show(f"HH-RLHF, {base}", run.manifest.test)
    assert run.manifest.test.margin.mean > 0
    sft = [row["eval/perplexity"] for row in Run(run.path.parent / "sft").metrics() if "eval/perplexity" in row]
    assert min(sft) < sft[0]


def fresh_model(shared: Path, folder: Path) -> Path:
    """A random Llama with the vocabulary of stories260K."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(shared / "models" / "stories260K")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "fresh")
    AutoTokenizer.from_pretrained(shared / "models" / "stories260K").save_pretrained(folder / "fresh")
    return folder / "fresh"


def show(name: str, test: Figures) -> None:
    figures = f"accuracy {test.accuracy}, margin {test.margin}, win rate {test.win_rate}"
    change = test.perplexity / test.reference_perplexity - 1
    print(f"\n{name}: {figures}, KL {test.kl:.2f}, perplexity {change:+.1%}")
