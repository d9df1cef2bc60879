"""Several processes: what two CPU ranks make of a recipe, and launches that are not what was asked for."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from commands import alignlab, same, wait_until

from alignlab.disk import read_lines
from alignlab.errors import MachineError, RunError
from alignlab.recipe.load import load_recipe
from alignlab.runs.run import Run
from alignlab.train import launch
from alignlab.train.stages import train_dpo

COMPARED = {"train/loss", "eval/loss", "eval/kl", "eval/rewards/margins", "eval/reply_tokens"}
CONFIGS = Path(__file__).parents[1] / "accelerate_configs"
RECIPE = """
about: a run of seconds
data: {{source: toy, max_prompt_tokens: 56, max_reply_tokens: 72, toy: {{pairs: 128}}}}
model: {{name: {model}, dtype: float32, load_in_4bit: {quantized}, lora: {lora}}}
sft:
  max_steps: 4
  learning_rate: {sft_rate}
  logging_steps: 2
  eval_steps: 2
  per_device_train_batch_size: {sft_batch}
  per_device_eval_batch_size: 13
dpo:
  max_steps: 8
  learning_rate: {dpo_rate}
  logging_steps: 2
  eval_steps: 4
  per_device_train_batch_size: {batch}
  per_device_eval_batch_size: 13
monitor: {{kl: {{prompts: 5, max_new_tokens: 8, batch_size: 2}}}}
"""
LORA = {"lora": "{r: 4, target_modules: all-linear}", "sft_rate": "1.0e-2", "dpo_rate": "1.0e-3"}
FULL = {"lora": "null", "sft_rate": "1.0e-3", "dpo_rate": "1.0e-4"}


@pytest.fixture(scope="module")
def workplace(folders, tmp_path_factory) -> Path:
    """A folder with recipes for one rank (8 rows a step) and for two ranks (4 rows each), plain and in 4-bit."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "recipes").mkdir()
    for quantized in ("plain", "quantized"):
        for ranks in (1, 2):
            facts = {"model": folders["llama"], "quantized": str(quantized == "quantized").lower(), "batch": 8 // ranks}
            facts["sft_batch"] = 8 if quantized == "quantized" else 8 // ranks  # whose SFT run both share
            (folder / "recipes" / f"{quantized}{ranks}.yaml").write_text(RECIPE.format(**LORA, **facts))
    for name, weights, batch in (
        ("full1", FULL, 8),
        ("full-ddp", FULL, 4),
        ("full-fsdp2", FULL, 4),
        ("plain-fsdp2", LORA, 4),
    ):
        facts = {"model": folders["llama"], "quantized": "false", "batch": batch, "sft_batch": batch}
        (folder / "recipes" / f"{name}.yaml").write_text(RECIPE.format(**weights, **facts))
    (folder / "fsdp2.yaml").write_text(
        (CONFIGS / "fsdp2.yaml").read_text().replace("mixed_precision: bf16", "mixed_precision: 'no'\nuse_cpu: true")
    )
    return folder


@pytest.fixture(scope="module")
def plain2(workplace) -> Run:
    """SFT and DPO on two ranks, made once."""
    for stage in ("sft", "dpo"):
        assert (done := on_two_ranks(workplace, stage, "plain2")).returncode == 0, done.stderr
    return Run(workplace / "runs/plain2/dpo")


def on_two_ranks(folder: Path, *arguments: str, launch_file: Path = CONFIGS / "two-cpu.yaml", **how):
    return alignlab(folder, *arguments, "--launch", str(launch_file), **how)


def test_sft_and_dpo_on_two_ranks_are_those_on_one(workplace, plain2):
    """Two ranks of 4 rows see the rows of one rank of 8: equal losses, samples and KL, each written once.

    At most one epoch, and 52 held-out pairs in batches of 13: no rank is short of a row, so none is counted twice.
    """
    train_dpo(load_recipe(str(workplace / "recipes/plain1.yaml")), root=workplace / "runs")
    for stage in ("sft", "dpo"):
        assert_two_are_one(workplace, f"plain{{}}/{stage}", within=1e-3)


def test_4bit_dpo_on_two_ranks_is_that_on_one(workplace):
    train_dpo(load_recipe(str(workplace / "recipes/quantized1.yaml")), root=workplace / "runs")
    shutil.copytree(workplace / "runs/quantized1/sft", workplace / "runs/quantized2/sft")
    assert (done := on_two_ranks(workplace, "dpo", "quantized2")).returncode == 0, done.stderr
    assert_two_are_one(workplace, "quantized{}/dpo", within=1e-2)


@pytest.mark.slow
def test_all_weights_trained_on_two_ranks_are_those_on_one(workplace):
    train_dpo(load_recipe(str(workplace / "recipes/full1.yaml")), root=workplace / "runs")
    for stage in ("sft", "dpo"):
        assert (done := on_two_ranks(workplace, stage, "full-ddp")).returncode == 0, done.stderr
        assert_same_training(*(Run(workplace / "runs" / each / stage) for each in ("full1", "full-ddp")), within=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "full"])
def test_weights_sharded_over_two_ranks_are_trained_as_on_one(name, workplace):
    """FSDP2: the losses of one process, and killed and resumed the run that was never killed."""
    sharded, how = f"{name}-fsdp2", {"launch_file": workplace / "fsdp2.yaml"}
    train_dpo(load_recipe(str(workplace / f"recipes/{name}1.yaml")), root=workplace / "runs")
    for stage in ("sft", "dpo"):
        assert (done := on_two_ranks(workplace, stage, sharded, **how)).returncode == 0, done.stderr
        assert_same_training(*(Run(workplace / "runs" / each / stage) for each in (f"{name}1", sharded)), within=1e-3)
    felled = Run(workplace / "runs" / sharded / "felled")
    process, said = with_a_rank_killed(1, workplace, felled, past_step=4, **how)
    assert process.returncode == 128 + signal.SIGKILL and "Traceback" not in said, said
    resumed = on_two_ranks(workplace, "dpo", sharded, "--run", "felled", **how)
    assert resumed.returncode == 0 and "resuming from" in resumed.stderr, resumed.stderr
    same(felled, Run(workplace / "runs" / sharded / "dpo"))


def assert_two_are_one(workplace: Path, name: str, within: float) -> None:
    assert_same_training(*(Run(workplace / "runs" / name.format(ranks)) for ranks in (1, 2)), within)


def assert_same_training(one: Run, two: Run, within: float) -> None:
    assert (one.manifest.world_size, two.manifest.world_size) == (1, 2)
    assert [row["step"] for row in two.metrics()] == [row["step"] for row in one.metrics()]
    for ours, theirs in zip(one.metrics(), two.metrics(), strict=True):
        for key in COMPARED & ours.keys():
            assert theirs[key] == pytest.approx(ours[key], rel=within, abs=1e-6), (two.path, ours["step"], key)
    samples = [[{k: v for k, v in row.items() if k != "kl"} for row in run.samples()] for run in (one, two)]
    assert samples[0] == samples[1]


def test_a_rank_that_dies_ends_the_launch_and_the_same_command_goes_on(workplace, plain2):
    felled = Run(workplace / "runs/plain2/felled")
    process, said = with_a_rank_killed(1, workplace, felled, past_step=4)
    assert process.returncode == 128 + signal.SIGKILL and "Traceback" not in said, said
    *before, launcher = said.splitlines()
    died = "another process of this launch has died; the same command goes on from the last checkpoint"
    assert {died, "stopping after this step, with a checkpoint; once more stops at once"} & {*before}
    assert launcher == "rank 1 was killed by SIGKILL; the same command goes on from the last checkpoint"
    assert (felled.manifest.status, felled.manifest.stop_reason) == ("failed", "rank 1 was killed by SIGKILL")
    resumed = on_two_ranks(workplace, "dpo", "plain2", "--run", "felled")
    assert resumed.returncode == 0 and "resuming from" in resumed.stderr, resumed.stderr
    same(felled, plain2)


def test_where_the_rank_that_writes_dies_the_launch_says_so_in_its_place(workplace, plain2):
    headless = Run(workplace / "runs/plain2/headless")
    process, said = with_a_rank_killed(0, workplace, headless, past_step=-1)
    assert process.returncode == 128 + signal.SIGKILL and "Traceback" not in said, said
    assert "[rank 1] another process of this launch has died" in said
    assert (headless.manifest.status, headless.manifest.stop_reason) == ("failed", "rank 0 was killed by SIGKILL")


def with_a_rank_killed(rank: int, workplace: Path, run: Run, past_step: int, **how) -> tuple[subprocess.Popen, str]:
    process = on_two_ranks(workplace, "dpo", run.path.parent.name, "--run", run.path.name, wait=False, **how)
    wait_until(process, lambda: any(row["step"] > past_step for row in read_lines(run.metrics_file)))
    ranks = psutil.Process(process.pid).children(recursive=True)
    next(each for each in ranks if each.environ().get("RANK") == str(rank)).kill()
    return process, process.communicate(timeout=120)[1]


def test_a_typo_is_one_line_and_starts_nothing(workplace):
    done = on_two_ranks(workplace, "dpo", "plain2", "dpo.betta=1")
    assert done.returncode == 2 and done.stderr.count("did you mean") == 1 and len(done.stderr.splitlines()) == 1


def test_wrong_keys_and_a_wrong_world_are_errors_under_accelerate_itself(workplace):
    """Without a launch file accelerate starts one CPU process for two, and says nothing; alignlab does."""
    beside = Path(sys.executable).parent
    accelerate = [str(beside / "accelerate"), "launch", "--cpu", "--num_processes", "2", "-m", "alignlab"]
    env = {**os.environ, "PATH": f"{beside}:{os.environ['PATH']}"}
    for words, said in ((["dpo.betta=1"], "did you mean 'beta'"), ([], "asked for 2 processes and started 1")):
        done = subprocess.run(
            [*accelerate, "sft", "plain2", *words], capture_output=True, text=True, cwd=workplace, env=env
        )
        assert done.returncode != 0 and said in done.stderr, done.stderr


def test_hosts_with_different_recipes_are_refused(workplace, tmp_path):
    """Two ranks that meet over the network, each in a folder of its own."""
    (tmp_path / "recipes").mkdir()
    text = (workplace / "recipes/plain2.yaml").read_text()
    (tmp_path / "recipes/plain2.yaml").write_text(text.replace("learning_rate: 1.0e-2", "learning_rate: 2.0e-2"))
    meet = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    meet |= {"MASTER_PORT": "29517", "ACCELERATE_USE_CPU": "true"}
    hosts = [
        alignlab(folder, "sft", "plain2", "--run", "hosts", wait=False, RANK=str(rank), **meet)
        for rank, folder in enumerate((workplace, tmp_path))
    ]
    said = [host.communicate(timeout=180)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [2, 2], said
    assert "rank 1 has another recipe than rank 0" in said[0] and "0.02" in said[0]


# --- without starting anything ---


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_launch_file_is_one_that_accelerate_reads(file):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert launch.read_config(file)["num_processes"] == config.num_processes >= 1
    assert file.read_text().startswith("# ")  # when to use it


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {name: x}\n", "it has no distributed_type"),
        ("distributed_type: MULTI_GPU\nmodel: x\n", "model are no keys of it"),
        ("a: [", "is not YAML"),
        ("- 1\n", "no accelerate config"),
    ],
)
def test_a_file_that_is_no_launch_file_is_refused(text, said, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(MachineError, match=said) as e:
        launch.read_config(tmp_path / "x.yaml")
    assert "\n" not in str(e.value)


def test_a_launch_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(MachineError, match="there is no launch file"):
        launch.read_config(tmp_path / "x.yaml")


def test_a_launch_file_of_alignlab_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert launch.read_config(Path("accelerate_configs/two-cpu.yaml"))["num_processes"] == 2
    assert launch.find_config(Path("two-cpu.yaml")) == Path("two-cpu.yaml")


@pytest.mark.parametrize("file", ["fsdp2.yaml", "zero2.yaml"])
def test_4bit_with_sharded_weights_is_refused_with_what_works(file):
    section = load_recipe("mistral").model
    with pytest.raises(MachineError, match=r"ddp\.yaml"):
        launch.launch(CONFIGS / file, section, ["dpo", "mistral"])
    launch.refuse_sharded_4bit(load_recipe("mistral", ["model.load_in_4bit=false"]).model, "FSDP")


def test_4bit_in_a_process_that_accelerate_shards_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(MachineError, match=r"ddp\.yaml"):
        launch.refuse_sharded_4bit(load_recipe("mistral").model)


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        ("python -m pytest", None),
        ("/bin/accelerate launch --num_processes 3 -m alignlab dpo tiny", 3),
        (f"python /bin/accelerate launch --config_file {CONFIGS}/two-cpu.yaml -m alignlab dpo tiny", 2),
        (f"accelerate-launch --config_file {CONFIGS}/hosts.yaml -m alignlab dpo tiny", 16),
        (f"accelerate launch --config_file {CONFIGS}/hosts.yaml --num_processes 4 -m alignlab dpo tiny", 4),
    ],
)
def test_what_was_asked_of_accelerate_is_read_from_its_command_line(command, asked):
    assert launch.asked_by(command.split()) == asked


def test_fewer_processes_than_asked_for_are_refused(monkeypatch):
    monkeypatch.setenv(launch.ASKED, "4")
    launch.check_world(4)
    with pytest.raises(MachineError, match="asked for 4 processes and started 1"):
        launch.check_world(1)


def test_srun_that_starts_runs_of_their_own_is_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    launch.check_world(4)
    with pytest.raises(MachineError, match="srun started 4 tasks"):
        launch.check_world(1)


def test_the_rank_whose_recipe_differs_is_named():
    launch.refuse_different_recipes(["a: 1\nb: 2\n"] * 3)
    with pytest.raises(RunError, match=r"rank 2 has another recipe than rank 0 \('b: 2' against 'b: 3'\)"):
        launch.refuse_different_recipes(["a: 1\nb: 2\n", "a: 1\nb: 2\n", "a: 1\nb: 3\n"])
