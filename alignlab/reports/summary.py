"""What a run changed, on one screen of text: read from its directory, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignlab.reports.rows import own_rows
from alignlab.reports.verdict import duration, verdict
from alignlab.runs.facts import RunFacts, read_run
from alignlab.runs.run import Manifest, Run
from alignlab.text.safe import one_line
from alignlab.text.tables import as_text, paragraph

SHOWN_REPLIES = 3
REPLY_LINES = 4


def summarize(run: Run) -> str:
    """What came of a finished run, its figures, replies side by side, and where everything lies."""
    facts = read_run(run.path)
    names, rows = own_rows(facts)
    seconds = facts.manifest.training_seconds
    took = "" if seconds is None else f" ({duration(seconds)})"
    lines = paragraph(f"{run.path} {facts.status}: {facts.stop_reason}{took}", more="  ")
    lines += ["", *paragraph(verdict(facts).headline), "", *as_text(rows, names)]
    for warning in facts.warnings:
        lines += paragraph(f"warning, step {warning.step}: {warning.message}", more="  ")
    for sample in [row for row in facts.samples if row.get("split") == "test"][:SHOWN_REPLIES]:
        lines += ["", *_side_by_side(sample, facts)]
    lines += ["", *_cost(facts.manifest)]
    return "\n".join([*lines, f"{run.path}/  metrics.jsonl, samples.jsonl, dropped.jsonl, manifest.json, model/"])


def _side_by_side(sample: Mapping[str, Any], facts: RunFacts) -> Iterator[str]:
    question = sample["prompt"].rsplit("\n\nHuman:", 1)[-1].removesuffix("\n\nAssistant:")
    spoken = [("prompt", question)]
    if "reference_reply" in sample:
        spoken.append((facts.reference_name, str(sample["reference_reply"])))
    for who, text in [*spoken, (facts.stage.upper(), sample["reply"])]:
        yield from paragraph(f"  {who:10} {one_line(text) or '(empty)'}", more=" " * 13, most=REPLY_LINES)


def _cost(manifest: Manifest) -> Sequence[str]:
    """What the run took: memory beside the plan where both are a GPU's, and the share of the time that KL cost."""
    if manifest.peak_memory_gib is None:
        return []
    memory = f"peak memory {manifest.peak_memory_gib:.2f} GiB"
    if not manifest.machine.gpus:
        memory += " of the process, libraries included"
    elif manifest.planned_gib:
        memory += f", {manifest.planned_gib:.2f} planned"
    if manifest.sampling_seconds is None or manifest.training_seconds is None:
        return [memory]
    share = manifest.sampling_seconds / max(manifest.training_seconds, 0.1)
    return paragraph(f"{memory}; sampling and KL took {share:.1%} of the training time", more="  ")
