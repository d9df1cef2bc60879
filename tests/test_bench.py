"""The benchmark scripts run at toy size, and their sums hold; their figures come from `make bench`."""

from __future__ import annotations

import importlib
import json
import statistics
from pathlib import Path

import pytest
import torch

from alignlab.models.layout import NOTHING, lay_out

GIB = 2**30


@pytest.fixture
def script(monkeypatch):
    """`script(name)` is a module of tests/bench, which is no package: each of its scripts runs by itself."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "bench"))
    return importlib.import_module


@pytest.fixture
def batches(script):
    return script("batches")


@pytest.fixture
def comparison(script):
    return script("comparison")


# Batches ------------------------------------------------------------------------


def test_a_pair_needs_its_common_prefix_once_and_no_padding(batches):
    """Prompts of 3 and 1; replies 1 2 3 | 1 9 and 4 | 5: 3 + 3 + 2 − 1 and 1 + 1 + 1; padded, four rows of 6."""
    batch = [
        {"prompt_ids": [7, 7, 7], "chosen_ids": [1, 2, 3], "rejected_ids": [1, 9]},
        {"prompt_ids": [7], "chosen_ids": [4], "rejected_ids": [5]},
    ]
    assert batches.needed_positions(batch) == 7 + 3
    assert batches.padded_positions(batch) == 24


def test_the_floor_is_what_packing_lays_out_without_its_gaps(batches):
    rows = batches.generated_rows(500, count=6).to_list()
    sequences = [torch.tensor(row["prompt_ids"] + row[name]) for name in ("chosen_ids", "rejected_ids") for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    layout = lay_out(ids, torch.tensor([len(sequence) for sequence in sequences]), reach=1e9)
    assert (layout.pair_RW != NOTHING).sum() == batches.needed_positions(rows)
    assert ids.numel() == batches.padded_positions(rows)


def test_grouped_batches_are_the_same_pairs_in_order_of_length(batches):
    rows = batches.generated_rows(500, count=150)
    alone = list(batches.random_batches(rows, 3))
    grouped = batches.grouped_batches(rows, 3, batches.MEGA_BATCH)
    flat = lambda found: [row for batch in found for row in batch]
    assert sorted(flat(grouped), key=str) == sorted(flat(alone), key=str)
    lengths = list(map(batches.length, flat(grouped)))
    assert lengths == sorted(lengths, reverse=True)
    ends = [grouped.index(batch) for batch in batches.grouped_batches(rows, 3, 5)]
    assert ends == [5, 15, 25, 35, 45]


def test_generated_rows_have_the_lengths_of_the_table(batches):
    rows = batches.generated_rows(500)
    for name, table in batches.QUANTILES.items():
        lengths = list(map(len, rows[name]))
        assert table[0] <= min(lengths) and max(lengths) <= table[-1]
        found = statistics.quantiles(lengths, n=4)
        assert found == pytest.approx([table[5], table[10], table[15]], rel=0.12)


def test_the_table_is_that_of_the_real_rows(batches, shared):
    rows, what = batches.find_rows("llama2", 32_000)
    assert (len(rows), what) == (1_929, "HH-RLHF harmless-base test")
    for name, table in batches.QUANTILES.items():
        lengths = list(map(len, rows[name]))
        assert [min(lengths), *map(round, statistics.quantiles(lengths, n=20)), max(lengths)] == table
    floor = lambda rows: _floor(batches, rows, pairs=8)
    assert floor(batches.generated_rows(500)) == pytest.approx(floor(rows), abs=0.02)


def _floor(batches, rows, pairs: int) -> float:
    found = list(batches.random_batches(rows, pairs))
    return sum(map(batches.needed_positions, found)) / sum(map(batches.padded_positions, found))


def test_rows_are_generated_only_where_none_are_named(batches, monkeypatch, tmp_path):
    monkeypatch.setattr(batches, "REAL", tmp_path / "none")
    monkeypatch.delenv("BENCH_DATA", raising=False)
    assert batches.find_rows("llama2", 500)[1].startswith("generated")
    monkeypatch.setenv("BENCH_DATA", str(tmp_path / "gone.jsonl"))
    with pytest.raises(SystemExit, match=r"BENCH_DATA: there is no .*gone\.jsonl"):
        batches.find_rows("llama2", 500)


# Sums ---------------------------------------------------------------------------


def found_by_hand(comparison):
    found = comparison.Found(needed=30)
    for name, seconds, losses, positions, peak in (
        ("stock", [2.0, 4.0, 6.0], [0.5, 0.6, 0.7], 100, 4 * GIB),
        ("shared", [1.0, 1.0, 1.0], [0.5, 0.6, 0.75], 40, 1 * GIB),
        ("grouped", [3.0, 3.0, 3.0], [0.1, 0.1, 0.1], 60, 2 * GIB),
    ):
        found.seconds[name], found.losses[name] = seconds, losses
        found.positions[name], found.peaks[name] = positions, peak
    return found


def test_time_is_theirs_over_ours_and_memory_ours_over_theirs(comparison):
    """Ratios 2, 4, 6; 40 of 100 positions, 30 needed; 1 GiB of 4; losses 0.05 apart at most."""
    cell = comparison.cells(found_by_hand(comparison))["shared"]
    assert (cell["ratio_median"], cell["ratio_quartiles"], cell["n"]) == (4.0, [2.0, 6.0], 3)
    assert (cell["positions_ratio"], cell["positions_floor"], cell["peak_memory_ratio"]) == (0.4, 0.3, 0.25)
    assert cell["loss_difference"] == pytest.approx(0.05)
    assert comparison.line(cell | {"model": "m", "pairs": 8, "variant": "shared"}) == (
        "m, 8 pairs, shared: 4.00 (2.00 to 6.00, n=3), so 25% of the time; 40% of the positions, 30% must be computed; "
        "25% of the peak memory; loss differs by at most 0.05"
    )


def test_grouped_batches_are_compared_by_total_time_and_by_no_loss(comparison):
    """Whichever of 3 s and 1 s are drawn again, the totals are 9 s and 3 s."""
    cells = comparison.cells(found_by_hand(comparison))
    assert set(cells) == {"shared", "shared-to-grouped"}
    cell = cells["shared-to-grouped"]
    assert (cell["ratio_median"], cell["ratio_quartiles"], cell["loss_difference"]) == (3.0, [3.0, 3.0], None)
    assert cell["positions_ratio"] == pytest.approx(40 / 60, abs=1e-4)


# Whole runs ---------------------------------------------------------------------


def test_the_cpu_bench_writes_a_cell_for_each_variant(script, tmp_path, capsys):
    script("step").main(["toy", "--pairs", "2", "--batches", "3", "--results", str(tmp_path)])
    cells = {cell["variant"]: cell for cell in map(json.loads, map(Path.read_text, tmp_path.iterdir()))}
    assert set(cells) == {"shared", "shared-stored", "stored", "shared-stored-to-stored", "shared-to-grouped"}
    assert (tmp_path / "step-cpu-toy-2-shared.json").is_file()
    assert len(capsys.readouterr().out.splitlines()) >= len(cells)
    for variant, cell in cells.items():
        assert (cell["model"], cell["pairs"], cell["n"], cell["rows"][:9]) == ("toy", 2, 3, "generated")
        assert (cell["loss_difference"] or 0) < 1e-5 and cell["machine"]["trl"]
        assert cell["ratio_quartiles"][0] <= cell["ratio_median"] <= cell["ratio_quartiles"][1]
        ours = variant != "stored"
        assert (cell["positions_ratio"] < 1) is (cell["peak_memory_ratio"] < 0.9) is ours
        assert cell["positions_floor"] <= cell["positions_ratio"]


def test_a_stopped_run_writes_what_it_has(script, comparison, tmp_path, monkeypatch):
    measure = comparison.Bench.measure

    def stopped(*args):
        for number, line in enumerate(measure(*args)):
            if number == 2:
                raise KeyboardInterrupt
            yield line

    monkeypatch.setattr(comparison.Bench, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        script("step").main(
            ["toy", "--pairs", "2", "--batches", "9", "--ways", "shared", "--results", str(tmp_path)],
        )
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["n"] == 3


def test_the_gpu_bench_runs_at_toy_size_and_writes_nothing(script, tmp_path, capsys):
    script("step_gpu").main(["--toy", "--results", str(tmp_path)])
    out = capsys.readouterr().out
    assert "llama2-toy, 2 pairs, shared-stored: " in out and "\nllama2-toy, 2 pairs, shared-to-grouped: " in out
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_gpu_bench_says_so(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script("step_gpu").main([])
    assert stopped.value.code == 2 and "there is no GPU here; --toy runs" in capsys.readouterr().err


def test_objectives_are_told_by_their_median_over_seeds_with_the_lowest_and_the_highest_win_rate(script):
    """Three seeds' win rates of 0.6, 0.7 and 0.9, and hours of 0.1, 0.2 and 0.6, which are 6, 12 and 36 minutes."""
    seeds = [{"kto": {"over sft": rate, "perplexity": 1.5, "steps": 4, "tokens": 1000, "hours": hours}}
             for rate, hours in ((0.6, 0.1), (0.9, 0.6), (0.7, 0.2))]  # fmt: skip
    *_, row = script("objectives").rows(seeds)
    assert row == "| kto | – | 0.70 (0.60 to 0.90) | – | – | 1.50 | 4 | 1,000 | 12.0 |"


# A real model -------------------------------------------------------------------


def test_without_the_model_the_real_benchmark_is_skipped_with_a_line(script, tmp_path, capsys):
    script("real").main(["--model", str(tmp_path / "none")])
    assert capsys.readouterr().out == f"skipped: there is no model at {tmp_path / 'none'} (make gemma270m)\n"


@pytest.mark.slow
def test_the_real_benchmark_compares_equal_losses(script, folders, tmp_path):
    from alignlab.data import toy
    from alignlab.recipe.load import ToySection

    data = tmp_path / "rows.jsonl"
    rows = ({"chosen": row["chosen"], "rejected": row["rejected"]} for row in toy.rows(ToySection(pairs=64)))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [
        "--model",
        str(folders["llama"]),
        "--data",
        str(data),
        "--times",
        "2",
        "--results",
        str(tmp_path / "found"),
    ]
    script("real").main(given)
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "found").iterdir()}
    assert len(found) == 4
    for name, entry in found.items():
        within = 0.01 if name == "real-held-out-evaluation" else 1e-4  # TRL weighs batches alike, not tokens
        assert entry["n"] == 2 and entry["loss_difference"] < within, name
