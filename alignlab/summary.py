"""What a run changed, on one screen of text: read from its directory, without torch."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

from alignlab.run import Run

SHOWN_REPLIES = 3


def summarize(run: Run) -> str:
    """The figures of a finished run, replies side by side where it has a reference, and where everything lies."""
    manifest = run.manifest
    test = manifest["test"]
    parts = [f"{run.path} {manifest['status']}: {manifest['stop_reason']} ({_seconds(manifest['training_seconds'])})"]
    parts += _dpo_table(test) if manifest["stage"] == "dpo" else _sft_table(run, test)
    parts += (
        ["", *(f"  step {w['step']}: {w['message']}" for w in manifest["warnings"])] if manifest.get("warnings") else []
    )
    parts += _side_by_side([s for s in run.samples() if s["split"] == "test"][:SHOWN_REPLIES])
    parts.append(_cost(manifest))
    parts.append(f"\n{run.path}/  metrics.jsonl, samples.jsonl, dropped.jsonl, manifest.json, model/")
    return "\n".join(parts)


def _cost(manifest: dict[str, Any]) -> str:
    """What the run took: memory beside the plan where both are a GPU's, and the share of the time that KL cost."""
    memory = f"peak memory {manifest['peak_memory_gib']:.2f} GiB"
    if not manifest["machine"].get("gpus"):
        memory += " of the process, libraries included"
    elif manifest.get("planned_gib"):
        memory += f", {manifest['planned_gib']:.2f} planned"
    share = manifest["sampling_seconds"] / max(manifest["training_seconds"], 0.1)
    return f"\n  {memory}; sampling and KL took {share:.1%} of the training time"


def _dpo_table(test: dict[str, Any]) -> list[str]:
    before, after = test["reference_perplexity"], test["perplexity"]
    rows = [
        ("reward accuracy", "", _estimate(test["rewards/accuracies"])),
        ("reward margin", "", _estimate(test["rewards/margins"])),
        ("perplexity of chosen", f"{before:.3f}", f"{after:.3f} ({after / before - 1:+.1%})"),
        ("KL, nats per reply", "", f"{test['kl']:.3g} ± {test['kl_stderr']:.2g}"),
        ("tokens per reply", "", f"{test['reply_tokens']:.1f}, {test['eos_rate']:.0%} ended by themselves"),
    ]
    if "win_rate" in test:
        rows.insert(0, ("win rate, toy's rule", "", _estimate(test["win_rate"])))
    return ["", f"  {'on the test split':24}{'reference':>10}   DPO", *(f"  {a:24}{b:>10}   {c}" for a, b, c in rows)]


def _sft_table(run: Run, test: dict[str, Any]) -> list[str]:
    held_out = [row["eval/perplexity"] for row in run.metrics() if "eval/perplexity" in row]
    return [
        f"  perplexity of held-out chosen replies: {held_out[0]:.3f} before, {min(held_out):.3f} after",
        f"  on the test split: {test['perplexity']:.3f} (n={test['n']} replies)",
    ]


def _side_by_side(samples: list[dict[str, Any]]) -> list[str]:
    lines = []
    for sample in samples:
        question = sample["prompt"].rsplit("\n\nHuman:", 1)[-1].removesuffix("\n\nAssistant:")
        lines += ["", *_wrapped("prompt", question)]
        lines += _wrapped("reference", sample["reference_reply"]) + _wrapped("DPO", sample["reply"])
    return lines


def _wrapped(label: str, text: str) -> list[str]:
    """Text of a model or a dataset, made harmless for a terminal and cut to four lines."""
    printable = "".join(c if c.isprintable() else " " for c in text).strip() or "(empty)"
    width = max(40, min(110, shutil.get_terminal_size().columns) - 14)
    lines = textwrap.wrap(printable, width, max_lines=4, placeholder=" …")
    return [f"  {label if i == 0 else '':10} {line}" for i, line in enumerate(lines)]


def _estimate(e: dict[str, Any]) -> str:
    return f"{e['mean']:.3g} ± {e['stderr']:.2g} (n={e['n']})"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
