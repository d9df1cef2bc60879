"""The Slurm scripts of the docs, run as they stand there; programs of the same name stand in for Slurm's."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from alignlab.cli.commands import main

DOCS = Path(__file__).parents[1] / "docs"
SCRIPTS = {
    page: re.findall(r"```sh\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    for page in sorted(os.listdir(DOCS))
    if page.endswith(".md")
}
# A job runs at once, in a shell of its own; its number is printed, and what depends on a failed one does not run
SBATCH = r"""#!/bin/bash
number=$(($(cat number) + 1)); echo $number > number
array=; script=
while [ $# -gt 0 ]; do
  case $1 in
    --array=*) array=${1#--array=} ;;
    --dependency=afterok:*) if grep -qx "${1##*:}" failed; then echo $number >> failed; exit; fi ;;
    --wrap) shift; printf '#!/bin/sh\n%s\n' "$1" > wrapped; script=wrapped ;;
    --*) ;;
    *) script=$1 ;;
  esac
  shift
done
echo "$number ${array:-alone}" >> submitted
program=$(head -n 1 $script); program=${program#\#!}
for task in $([ -z "$array" ] && echo alone || seq ${array%-*} ${array#*-}); do
  SLURM_ARRAY_TASK_ID=$task $program $script >> output 2>&1 || echo $number >> failed
done
echo $number
"""
SRUN = """#!/bin/bash
for task in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_PROCID=$task "$@" & jobs="$jobs $!"; done
for job in $jobs; do wait $job || failed=1; done
exit ${failed:-0}
"""
SCONTROL = '#!/bin/bash\n[ "$1 $2 $3" = "show hostnames node[1-2]" ] && printf "node1\\nnode2\\n"\n'
RECORD = """#!/bin/bash
echo "$(basename $0) $*" >> ran.${SLURM_PROCID:-all}
case "$*" in *$FAILS*) exit 1 ;; esac
"""


@pytest.fixture
def login(tmp_path):
    """A function that runs a script on a login node, in a folder with `.venv` and Slurm's programs on the PATH."""
    slurm, activated = tmp_path / "slurm", tmp_path / ".venv" / "bin"
    programs = {slurm / "sbatch": SBATCH, slurm / "srun": SRUN, slurm / "scontrol": SCONTROL}
    programs |= {activated / name: RECORD for name in ("alignlab", "accelerate")}
    for path, text in programs.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (activated / "activate").write_text(f'PATH="{activated}:$PATH"\n')
    for name, text in {"number": "100\n", "failed": "", "output": ""}.items():
        (tmp_path / name).write_text(text)

    def run(script: str, **environment: str) -> subprocess.CompletedProcess:
        env = {"PATH": f"{slurm}:/usr/bin:/bin", "FAILS": "nothing", **environment}
        (tmp_path / "script").write_text(script)
        pipes = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 60}
        return subprocess.run(["bash", "script"], cwd=tmp_path, env=env, **pipes)

    return run


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def sweep(login, tmp_path, capsys, monkeypatch) -> str:
    """The script that submits, with `jobs` as `--print` writes them for three betas, and `member.sbatch`."""
    *_, member, submit = SCRIPTS["sweeps.md"]
    (tmp_path / "member.sbatch").write_text(member)
    monkeypatch.setenv("PATH", f"{tmp_path}/.venv/bin:/usr/bin:/bin")  # as after the activation
    assert main(["sweep", "mistral", "--betas", "0.5,0.3,0.1", "--print"]) == 0
    (tmp_path / "jobs").write_text(capsys.readouterr().out)
    return submit


def test_a_sweep_on_slurm_runs_what_all_share_then_each_member_then_the_table(login, sweep, tmp_path):
    """The array has as many tasks as there are members, and each job activates the environment."""
    done = login(sweep)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert lines(tmp_path / "submitted") == ["101 alone", "102 1-3", "103 alone"]
    assert not lines(tmp_path / "output") and not lines(tmp_path / "failed")
    assert lines(tmp_path / "ran.all") == [*lines(tmp_path / "jobs"), "alignlab sweep mistral --collect"]
    assert [line.split()[:3] for line in lines(tmp_path / "jobs")[1:]] == [["alignlab", "dpo", "mistral"]] * 3


def test_where_what_all_share_fails_no_member_starts(login, sweep, tmp_path):
    first = lines(tmp_path / "jobs")[0]
    login(sweep, FAILS=first.split(" ", 1)[1])
    assert lines(tmp_path / "ran.all")[0] == first
    assert not any("dpo.beta" in line for line in lines(tmp_path / "ran.all")[1:])


def several_hosts() -> str:
    return next(script for script in SCRIPTS["several-gpus.md"] if script.startswith("#!/bin/bash"))


HOSTS = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "node[1-2]"}


def test_each_host_starts_its_part_of_the_launch_for_one_stage_after_the_other(login, tmp_path):
    done = login(several_hosts(), **HOSTS)
    assert done.returncode == 0 and not done.stderr, done.stderr
    for rank in (0, 1):
        words = f"--num_machines 2 --num_processes 16 --machine_rank {rank} --main_process_ip node1"
        assert lines(tmp_path / f"ran.{rank}") == [
            f"accelerate launch --config_file accelerate_configs/hosts.yaml {words} -m alignlab {stage} mistral"
            for stage in ("sft", "dpo")
        ]


def test_where_sft_fails_on_a_host_dpo_does_not_start(login, tmp_path):
    done = login(several_hosts(), **HOSTS, FAILS="machine_rank 1 ")
    assert done.returncode == 1
    assert [len(lines(tmp_path / f"ran.{rank}")) for rank in (0, 1)] == [1, 1]


def test_a_wrapped_script_is_one_that_any_sh_runs():
    """`sbatch --wrap` runs `/bin/sh`, which on many hosts knows no `source`."""
    wrapped = re.findall(r"--wrap \"([^\n]*)\"", "\n".join(SCRIPTS["sweeps.md"]))
    assert len(wrapped) == 2 and all(text.startswith(". .venv/bin/activate; ") for text in wrapped)
