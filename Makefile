# make              the targets
# make dpo RECIPE=mistral ARGS="dpo.beta=0.3" LAUNCH=accelerate_configs/ddp.yaml

RECIPE ?= tiny
PYTHON ?= python3
BIN := .venv/bin
RUN := $(if $(LAUNCH),$(BIN)/accelerate launch --config_file $(LAUNCH) -m alignlab,$(BIN)/alignlab)

.DEFAULT_GOAL := help
.PHONY: help install demo test quick check bench list show data sft dpo

help:  ## this list
	@grep -hE '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /	/' | expand -t 12

install: .venv/.installed  ## .venv with everything in it, once

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/alignlab show tiny > /dev/null
	touch $@

demo: install    ## SFT, then DPO, on the embedded default: about two minutes on two cores
	$(BIN)/alignlab sft tiny
	$(BIN)/alignlab dpo tiny

test: install    ## the whole test suite
	$(BIN)/pytest

quick: install   ## the tests that take seconds
	$(BIN)/pytest -m "not slow"

check: install   ## format, lint, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pytest

bench: install   ## a DPO step against stock TRL, on CPU: about 12 minutes
	MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 \
	  $(BIN)/python tests/bench/step.py llama-25m

list: install    ## the recipes
	@$(RUN) list

show: install    ## a recipe with everything in it
	@$(RUN) show $(RECIPE) $(ARGS)

data: install    ## what is in the dataset
	@$(RUN) data $(RECIPE) $(ARGS)

sft: install     ## supervised fine-tuning
	@$(RUN) sft $(RECIPE) $(ARGS)

dpo: install     ## DPO from the SFT run
	@$(RUN) dpo $(RECIPE) $(ARGS)
