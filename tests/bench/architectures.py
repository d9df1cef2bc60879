"""SFT, DPO and an evaluation on two dozen architectures at toy size: which train, and what the others say.

    python tests/bench/architectures.py [--only gemma2 …] [--root FOLDER]

Each is a random model of two layers with the toy's tokenizer, LoRA on all linear layers. Commands are run as a user
runs them; a model that cannot be trained has to say so in one line. Results go to results/architectures.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import time
import traceback
from pathlib import Path

os.environ |= {"WANDB_MODE": "disabled", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}

RESULTS = Path(__file__).parent / "results" / "architectures.json"
SIZE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
WINDOW = {"sliding_window": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# model type → what its config needs beside SIZE
ARCHITECTURES = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "cohere2": {"head_dim": 16, **WINDOW},
    "exaone4": {"head_dim": 16},
    "falcon": {"alibi": False},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, **WINDOW},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, **WINDOW},
    "glm4": {"head_dim": 16},
    "gpt_neox": {},
    "gpt_oss": {"head_dim": 16, **EXPERTS, **WINDOW},
    "granite": {},
    "granitemoehybrid": {
        "shared_intermediate_size": 64,
        "layer_types": ["mamba", "attention"],
        "mamba_chunk_size": 16,
        **EXPERTS,
    },
    "lfm2": {"block_multiple_of": 16, "layer_types": ["conv", "full_attention"]},
    "mamba": {},
    "mistral": {"head_dim": 16, **WINDOW},
    "mixtral": EXPERTS,
    "olmo2": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "phi": {},
    "phi3": {"pad_token_id": 1, **WINDOW},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "smollm3": {"pad_token_id": 1},
    "stablelm": {},
    "starcoder2": {},
}
RECIPE = """
about: seconds on a CPU
data: {{source: toy, max_prompt_tokens: 80, max_reply_tokens: 48, toy: {{pairs: 96}}}}
model: {{name: {name}, dtype: float32, lora: {{r: 4, target_modules: all-linear}}}}
sft: {{max_steps: 4, learning_rate: 1.0e-2, logging_steps: 2, eval_steps: 2}}
dpo: {{max_steps: 4, learning_rate: 1.0e-3, logging_steps: 2, eval_steps: 2}}
monitor: {{kl: {{prompts: 4, max_new_tokens: 8}}}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, default=[*ARCHITECTURES])
    parser.add_argument("--root", type=Path, default=Path("architectures"))
    args = parser.parse_args()
    root = args.root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    os.chdir(root)
    found = {}
    for kind in args.only:
        found[kind] = {"parameters": make(kind, root / kind), **tried(kind, root / kind)}
        print(f"{kind:18}{found[kind]['parameters']:>10,}  {found[kind]['came']}", flush=True)
    trained = sum(each["came"] == "trains" for each in found.values())
    print(f"{trained} of {len(found)} train")
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    RESULTS.write_text(json.dumps({**kept, **found}, indent=1) + "\n")


def make(kind: str, folder: Path) -> int:
    """Writes a random model of this type with the toy's tokenizer, and returns how many parameters it has."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from alignlab.models import pretrain
    from alignlab.recipe.load import ToySection

    tokenizer = pretrain.tokenizer(ToySection(pairs=96))
    words = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZE, **words, "bos_token_id": None, **ARCHITECTURES[kind]})
    model = AutoModelForCausalLM.from_config(config).float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(each.numel() for each in model.parameters())


def tried(kind: str, model: Path) -> dict[str, object]:
    """What came of SFT, DPO and an evaluation: "trains", or the line that a command ended with."""
    recipe = Path(f"{kind}.yaml")
    recipe.write_text(RECIPE.format(name=model))
    shutil.rmtree(Path("runs") / kind, ignore_errors=True)
    began = time.monotonic()
    for command in (
        ["sft", str(recipe)],
        ["dpo", str(recipe)],
        ["eval", str(recipe), "--limit", "4", "--max-new-tokens", "8"],
    ):
        code, said = run(command)
        if code:
            said = said.replace(f"{Path.cwd()}/", "")
            return {"came": f"{command[0]}: {said}", "seconds": round(time.monotonic() - began, 1)}
    return {"came": "trains", "seconds": round(time.monotonic() - began, 1)}


def run(command: list[str]) -> tuple[int, str]:
    from alignlab.cli.commands import main as alignlab

    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = alignlab(command)
    except SystemExit as e:
        code = int(e.code or 0)
    except BaseException:
        return 1, "TRACEBACK " + traceback.format_exc().strip().splitlines()[-1]
    lines = [line for line in err.getvalue().strip().splitlines() if "warning" not in line.lower()]
    return code, lines[-1] if lines else ""


if __name__ == "__main__":
    main()
