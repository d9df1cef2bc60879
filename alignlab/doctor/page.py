"""An examination as text for a terminal: what is in the data, what is wrong with it, and what training will take."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignlab.data.splits import SPLITS
from alignlab.doctor.description import PERCENTILES
from alignlab.doctor.examination import abridged
from alignlab.text.safe import harmless

SHOWN_CHARACTERS = 700  # of one prompt or reply
WIDTH = 110  # of the sentences
INDENT = " " * 10


def render(examination: Mapping[str, Any]) -> str:
    """The page of `alignlab data`."""
    bias = examination["length_bias"]
    paths = examination["path"] if isinstance(examination["path"], list) else [examination["path"]]
    where = " ".join(filter(None, (*paths, examination["subset"])))
    lines = [
        f"{examination['layout']}  {where}  as {examination['format']}",
        *(harmless(f"made by alignlab pairs: {said}") for said in examination.get("made_by", ())),
        f"rows read       {examination['rows_read']:>9,}",
        f"pairs kept      {examination['kept']:>9,}   "
        + ", ".join(f"{split} {examination['splits'][split]:,}" for split in SPLITS),
        *_parts(examination["parts"]),
        *_counts("rows dropped", examination["dropped"]),
        *_counts("repaired", examination["repaired"]),
        "",
        "tokens    " + "".join(f"{name:>9}" for name in ("mean", *PERCENTILES)),
        *(_token_line(name, examination["tokens"][name]) for name in ("prompt", "chosen", "rejected")),
        *_turns(examination["turns"]),
        *_stops(examination.get("stops") or ()),
        "",
        f"the longer reply is the chosen one: {bias['longer_is_chosen']:.3f} ± {bias['stderr']:.3f} (n={bias['n']:,})",
        _shortcuts(examination["shortcuts"]),
        *_findings(examination["findings"]),
        *(line for stage, cost in examination["costs"].items() for line in _cost(stage, cost)),
    ]
    for number, example in enumerate(examination["examples"], 1):
        lines += ["", f"training pair {number}, as the model sees it"]
        for name in ("prompt", "chosen", "rejected"):
            shown = harmless(abridged(example[name], SHOWN_CHARACTERS))
            lines += [f"  {name}", textwrap.indent(shown, "  | ", lambda line: True)]
    return "\n".join(lines)


def _turns(turns: Mapping[str, int]) -> list[str]:
    if not turns:
        return []
    most = max(map(int, turns))
    some = ", ".join(f"{count:,} of {n}" for n, count in list(turns.items())[:6])
    return [f"prompts by Human turns: {some}" + (f", … up to {most}" if len(turns) > 6 else "")]


def _stops(stops: Sequence[str]) -> list[str]:
    return [f"a reply ends at {' or '.join(map(repr, stops))}"] if stops else []


def _shortcuts(found: Mapping[str, Any]) -> str:
    model, longest = found["model"], found["longest"]
    told = f"{model['mean']:.3f} ± {model['stderr']:.3f} (n={model['n']:,}), by length alone {longest['mean']:.3f}"
    return f"held-out pairs told by shallow features: {told}"


def _findings(findings: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was found, each with three pairs and what to set; what was not, by name."""
    there, absent = [f for f in findings if f["count"]], [f["name"] for f in findings if not f["count"]]
    lines = [line for finding in there for line in _finding(finding)]
    if absent:
        lines += ["", *textwrap.wrap(f"looked for, and not there: {', '.join(absent)}", WIDTH)]
    return lines


def _finding(finding: Mapping[str, Any]) -> list[str]:
    head = f"{finding['level']:<9} {finding['name']}: {finding['says']}"
    lines = ["", *textwrap.wrap(harmless(head), WIDTH, subsequent_indent=INDENT)]
    for one in finding["shown"]:
        place = f"{Path(one['file']).name}:{one['line']}  " if "file" in one else ""
        lines.append(harmless(f"{INDENT}· {place}{one['what']}"))
    indents = {"initial_indent": f"{INDENT}→ ", "subsequent_indent": f"{INDENT}  "}
    return lines + textwrap.wrap(finding["advice"], WIDTH, **indents)


def _cost(stage: str, cost: Mapping[str, Any]) -> list[str]:
    rows = f"{cost['rows']:,} rows, {cost['steps']:,} steps of {cost['rows_a_step']} ({cost['epochs']} epochs)"
    tokens = f"{cost['tokens'] / 1e6:,.2f} M tokens"
    if cost["tokens_with_shared_prompts"] != cost["tokens"]:
        tokens += f" ({cost['tokens_with_shared_prompts'] / 1e6:,.2f} M where prompts are shared)"
    lines = ["", f"{stage:<9} {rows}, {tokens}"]
    if cost["hours"]:
        hours = ", ".join(f"{_time(value)} on an {gpu}" for gpu, value in cost["hours"].items())
        lines.append(f"{INDENT}{cost['operations']:.2g} operations: {hours} ({cost['why']})")
    if measured := cost["measured"]:
        pace = f"{measured['seconds_a_step']} s a step in {measured['run']}"
        lines.append(f"{INDENT}{_time(measured['hours'])} at {pace}, where that ran")
    return lines


def _time(hours: float) -> str:
    return f"{hours:g} h" if hours >= 1 else f"{60 * hours:.0f} min" if hours >= 1 / 60 else "under a minute"


def _parts(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a path, where there are several."""
    if len(parts) < 2:
        return []
    line = "  {rows:>9,} rows, {kept:,} kept, {dropped:,} dropped  {path} as {source}"
    return [line.format(**part) for part in parts]


def _counts(title: str, counts: Mapping[str, int]) -> list[str]:
    lines = [f"{title:<15} {sum(counts.values()):>9,}"]
    return lines + [f"  {count:>9,}  {what}" for what, count in sorted(counts.items(), key=lambda item: -item[1])]


def _token_line(name: str, tokens: Mapping[str, float]) -> str:
    return f"{name:<10}" + "".join(f"{tokens[column]:>9,}" for column in ("mean", *PERCENTILES))
