"""One DPO run as TRL alone does it, in a process of its own: what `sweep.py` compares with.

    python tests/bench/stock.py FOLDER BETA

FOLDER holds `model/`, `train.json`, `validation.json` (prompt, chosen, rejected) and `settings.json`: DPOConfig's
arguments, and `lora` where there is an adapter. What came of it is written to `stock-BETA.json` in it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer


def main(folder: Path, beta: float) -> None:
    settings = json.loads((folder / "settings.json").read_text())
    lora = settings.pop("lora")
    files = {split: str(folder / f"{split}.json") for split in ("train", "validation")}
    rows = load_dataset("json", data_files=files, cache_dir=str(folder / f"datasets-{beta}"))
    set_seed(42)  # which alignlab does too, so that both sides draw the same adapter
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32"),
        args=DPOConfig(output_dir=str(folder / f"stock-{beta}"), beta=beta, **settings),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora) if lora else None,
    )
    training = trainer.train().metrics["train_runtime"]
    trainer.save_model()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    margins = [row["eval_rewards/margins"] for row in trainer.state.log_history if "eval_loss" in row]
    evaluating = sum(row["eval_runtime"] for row in trainer.state.log_history if "eval_runtime" in row)
    seconds = {"training": training, "evaluating": evaluating}
    found = {"losses": losses, "margins": margins, "steps": trainer.state.global_step, "seconds": seconds}
    (folder / f"stock-{beta}.json").write_text(json.dumps({**found, "ids": ids_of(trainer.train_dataset)}))


def ids_of(pairs: Dataset) -> str:
    """A digest of the token ids that are trained on."""
    columns = zip(*(pairs[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")), strict=True)
    return hashlib.sha256(json.dumps([list(map(list, ids)) for ids in columns]).encode()).hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
