"""What a run changed, on one screen of text: read from its directory, without torch."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

from alignlab.estimate import Estimate, is_number
from alignlab.run import Figures, Manifest, Run

SHOWN_REPLIES = 3


def summarize(run: Run) -> str:
    """The figures of a finished run, replies side by side where it has a reference, and where everything lies."""
    manifest = run.manifest
    test = manifest.test or Figures()
    parts = [f"{run.path} {manifest.status}: {manifest.stop_reason}{_took(manifest)}"]
    parts += _dpo_table(test) if manifest.stage == "dpo" else _sft_table(run, test)
    parts += [""] * bool(manifest.warnings)
    parts += [f"  step {warning.step}: {warning.message}" for warning in manifest.warnings]
    parts += _side_by_side([s for s in run.samples() if s["split"] == "test"][:SHOWN_REPLIES])
    parts += _cost(manifest)
    parts.append(f"\n{run.path}/  metrics.jsonl, samples.jsonl, dropped.jsonl, manifest.json, model/")
    return "\n".join(parts)


def _took(manifest: Manifest) -> str:
    return "" if manifest.training_seconds is None else f" ({_seconds(manifest.training_seconds)})"


def _cost(manifest: Manifest) -> list[str]:
    """What the run took: memory beside the plan where both are a GPU's, and the share of the time that KL cost."""
    if manifest.peak_memory_gib is None:
        return []
    memory = f"\n  peak memory {manifest.peak_memory_gib:.2f} GiB"
    if not manifest.machine.gpus:
        memory += " of the process, libraries included"
    elif manifest.planned_gib:
        memory += f", {manifest.planned_gib:.2f} planned"
    if manifest.sampling_seconds is None or manifest.training_seconds is None:
        return [memory]
    share = manifest.sampling_seconds / max(manifest.training_seconds, 0.1)
    return [f"{memory}; sampling and KL took {share:.1%} of the training time"]


def _dpo_table(test: Figures) -> list[str]:
    rows = [
        ("win rate, toy's rule", "", test.win_rate),
        ("reward accuracy", "", test.accuracy),
        ("reward margin", "", test.margin),
        _perplexities(test),
        ("KL, nats per reply", "", None if test.kl is None else Estimate(test.kl, test.kl_stderr)),
        ("tokens per reply", "", _lengths(test)),
    ]
    lines = [f"  {label:24}{before:>10}   {after}" for label, before, after in rows if after]
    return ["", f"  {'on the test split':24}{'reference':>10}   DPO", *lines]


def _perplexities(test: Figures) -> tuple[str, str, str]:
    label, before, after = "perplexity of chosen", test.reference_perplexity, test.perplexity
    if after is None or not before:
        return label, "", "" if after is None else f"{after:.3f}"
    return label, f"{before:.3f}", f"{after:.3f} ({after / before - 1:+.1%})"


def _lengths(test: Figures) -> str:
    if test.reply_tokens is None or test.eos_rate is None:
        return ""
    return f"{test.reply_tokens:.1f}, {test.eos_rate:.0%} ended by themselves"


def _sft_table(run: Run, test: Figures) -> list[str]:
    lines = []
    if held_out := [row["eval/perplexity"] for row in run.metrics() if is_number(row.get("eval/perplexity"))]:
        lines.append(f"  perplexity of held-out chosen replies: {held_out[0]:.3f} before, {min(held_out):.3f} after")
    if test.perplexity is not None:
        lines.append(f"  on the test split: {test.perplexity:.3f} (n={test.n} replies)")
    return lines


def _side_by_side(samples: list[dict[str, Any]]) -> list[str]:
    lines = []
    for sample in samples:
        question = sample["prompt"].rsplit("\n\nHuman:", 1)[-1].removesuffix("\n\nAssistant:")
        lines += ["", *_wrapped("prompt", question)]
        if "reference_reply" in sample:
            lines += _wrapped("reference", str(sample["reference_reply"]))
        lines += _wrapped("DPO", sample["reply"])
    return lines


def _wrapped(label: str, text: str) -> list[str]:
    """Text of a model or a dataset, made harmless for a terminal and cut to four lines."""
    printable = "".join(c if c.isprintable() else " " for c in text).strip() or "(empty)"
    width = max(40, min(110, shutil.get_terminal_size().columns) - 14)
    lines = textwrap.wrap(printable, width, max_lines=4, placeholder=" …")
    return [f"  {label if i == 0 else '':10} {line}" for i, line in enumerate(lines)]


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
