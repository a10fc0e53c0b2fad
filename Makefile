# The commands of this repository. Each makes the environment first, when it is not there yet.
SHELL := /bin/bash
PYTHON_VENV := .venv/bin/python
SOURCES := $(wildcard samba_megatron pretrain tools slurm tests)
LOCK := $(PYTHON_VENV) -m uv pip compile pyproject.toml --quiet --python-version 3.12 \
	--python-platform x86_64-unknown-linux-gnu --no-header --no-annotate

.PHONY: always help setup setup-gpu doctor quickstart mlflow test lint format lock clean

help:  ## This list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

setup: .venv/.ready  ## The environment (.venv) with the pinned packages.
	@echo "[setup] .venv holds the packages of requirements.lock"

# Also when the interpreter behind .venv is gone, whatever the dates say.
.venv/.ready: requirements.lock pyproject.toml tools/setup_environment.sh \
		$(if $(shell $(PYTHON_VENV) --version 2>/dev/null),,always)
	@tools/setup_environment.sh

always:

setup-gpu:  ## The same, with Transformer Engine and the fast kernels for an NVIDIA GPU.
	@tools/setup_environment.sh --gpu

doctor: .venv/.ready  ## What is installed, which kernels work here, what is missing and what mends it.
	@$(PYTHON_VENV) tools/doctor.py $(ARGS)

quickstart: .venv/.ready  ## Corpus, tokenizer, dataset, training, resuming: the whole path, about 10 minutes.
	@$(PYTHON_VENV) tools/quickstart.py $(ARGS)

mlflow: .venv/.ready  ## MLflow's web page over a tracking database: make mlflow ARGS=TRACKING_URI
	@$(PYTHON_VENV) -m mlflow ui --backend-store-uri $(or $(ARGS),$(error which one? ARGS=TRACKING_URI))

test: .venv/.ready  ## All tests that this machine can run.
	@$(PYTHON_VENV) -m pytest $(ARGS)

lint: .venv/.ready  ## Style and types.
	@$(PYTHON_VENV) -m ruff check
	@$(PYTHON_VENV) -m ruff format --check
	@$(PYTHON_VENV) -m mypy $(SOURCES)

format: .venv/.ready  ## Rewrites the sources in the house style.
	@$(PYTHON_VENV) -m ruff check --fix
	@$(PYTHON_VENV) -m ruff format

lock: .venv/.ready  ## Derives the lock files from pyproject.toml, keeping versions that still fit.
	@$(LOCK) --extra dev --extra tracking --extra quantize --extra evaluate --extra corpora --output-file requirements.lock
	@$(LOCK) --all-extras --constraint requirements.lock --output-file requirements-gpu.lock

clean:  ## Removes the environment, caches and the quickstart's results.
	rm -f .venv/.ready
	rm -rf .venv .venv.lock quickstart *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find samba_megatron pretrain tools slurm tests -name __pycache__ -prune -exec rm -rf {} +
