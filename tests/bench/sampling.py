"""What sampling and KL cost beside training, at the settings of a shipped recipe: time, and peak of memory.

    python tests/bench/sampling.py [--micro-batches 4]

A model of GPT-2's shape with random weights (so that most replies run to the cap: the dearest case), the recipe's LoRA,
batches and lengths, real HH-RLHF helpful-base rows from `BENCH_DATA` or ../shared beside the checkout. The time of one
micro-batch is multiplied up to the steps between two evaluations, and set against one evaluation's sampling.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ |= {"WANDB_MODE": "disabled", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from machine import machine
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from alignlab.disk import write_json
from alignlab.memory.plan import GIB
from alignlab.models import load as models
from alignlab.recipe.arguments import TrainingContext
from alignlab.recipe.load import KLSection, load_recipe
from alignlab.runs.run import Run
from alignlab.train.figures import held_out_prompts
from alignlab.train.probe import measured
from alignlab.train.samples import Samples
from alignlab.train.stages import prepare_data, trl_config
from alignlab.train.trainers import AlignDPOTrainer

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared"
SAMPLED = 16  # prompts that are timed, in two batches; the recipe's 64 are eight such batches, one after another
DATA = Path(os.environ.get("BENCH_DATA", SHARED / "data" / "hh-rlhf" / "helpful-base.test.jsonl.gz"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--micro-batches", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer, samples = prepared(Path(folder))
        found = cost(trainer, samples, args.micro_batches)
    found = {"recipe": "gpt2", **found, "machine": machine(threads=torch.get_num_threads())}
    write_json(HERE / "results" / "sampling-gpt2.json", found)
    print(
        f"gpt2: an evaluation's sampling and KL take {found['sampling_seconds']:.0f} s, the {found['steps']} steps "
        f"before it {found['training_seconds']:.0f} s: {found['share']:.1%} of the time; peak of tensors "
        f"{found['sampling_peak_gib']:.2f} GiB sampling, {found['training_peak_gib']:.2f} GiB training"
    )


def prepared(folder: Path) -> tuple[AlignDPOTrainer, Samples]:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder / "gpt2")
    AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "gpt2").save_pretrained(folder / "gpt2")
    own = [
        f"model.name={folder / 'gpt2'}",
        f"data.path={DATA}",
        "data.subset=null",
        "data.max_pairs=1500",
        f"monitor.kl.prompts={SAMPLED}",
    ]
    recipe = load_recipe("gpt2", own)
    tokenizer, pairs = prepare_data(recipe)
    policy = models.add_adapter(models.load_weights(recipe.model), recipe.model)
    here = TrainingContext(folder, len(pairs.train), on_cpu=True)
    rows = {"train_dataset": pairs.train, "eval_dataset": pairs.validation, "processing_class": tokenizer}
    trainer = AlignDPOTrainer(policy, None, trl_config(recipe, "dpo", here), **rows)
    trainer.share_prefixes("auto")
    for name, weight in policy.named_parameters():
        if "lora_B.default" in name:  # a policy that has left its reference
            torch.nn.init.normal_(weight, std=0.01)
    return trainer, Samples(Run(folder), tokenizer, held_out_prompts(recipe, pairs.validation, "validation", 0))


def cost(trainer: AlignDPOTrainer, samples: Samples, count: int) -> dict[str, float]:
    size, steps = trainer.args.per_device_train_batch_size, int(trainer.args.eval_steps)
    micro = [micro_batch(trainer, number, size) for number in range(count + 1)][1:]  # the first is computed both ways
    draw = lambda: samples.measure(trainer.model, 0, trainer.reference_context())
    draw()  # and the reference's own replies, once a run
    began = time.perf_counter()
    draw()
    sampling = (time.perf_counter() - began) * KLSection().prompts / SAMPLED
    training = statistics.median(micro) * trainer.args.gradient_accumulation_steps * steps
    return {
        "steps": steps,
        "micro_batch_seconds": round(statistics.median(micro), 2),
        "training_seconds": round(training, 1),
        "sampling_seconds": round(sampling, 1),
        "share": round(sampling / (sampling + training), 4),
        "training_peak_gib": round(peak(trainer, lambda: micro_batch(trainer, 0, size)), 3),
        "sampling_peak_gib": round(peak(trainer, draw), 3),
    }


def micro_batch(trainer: AlignDPOTrainer, number: int, size: int) -> float:
    rows = trainer.train_dataset.select(range(number * size, (number + 1) * size)).to_list()
    trainer.model.train()
    began = time.perf_counter()
    trainer.compute_loss(trainer.model, trainer.data_collator(rows)).backward()
    trainer.model.zero_grad()
    return time.perf_counter() - began


def peak(trainer: AlignDPOTrainer, call) -> float:
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(measured(trainer.model, trainer))
        call()
    return found["peak"] / GIB


if __name__ == "__main__":
    main()
