# One virtual environment for all targets. PYTHON chooses the interpreter (3.10 to 3.13), VENV the place.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

# A file at a time in each of two processes, in the order of tests/conftest.py.
IN_TWO = -n 2 --dist loadfile --no-loadscope-reorder

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart tasks test test-slow test-all compat conformance families faults quality docs bench ablation clean

quickstart: $(VENV)/.train  ## train and test a tiny LaVIN on this machine; ARGS="--image FILE" asks about your own image
	$(VENV)/bin/lavin quickstart $(ARGS)

tasks: $(VENV)/.train $(VENV)/.eval  ## captions and boxes: the pool-adapter beside the class-token taps
	$(VENV)/bin/python -m lavin.recipes.tasks $(ARGS)

test: $(VENV)/.dev  ## the quick tests and the main path, some minutes on two cores; ARGS goes to pytest
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest $(IN_TWO) $(ARGS)

test-slow: $(VENV)/.dev  ## all the others: real training runs, fresh environments, every family of transformers
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest $(IN_TWO) -m "slow and not main_path" $(ARGS)

test-all: $(VENV)/.dev  ## every test
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest $(IN_TWO) -m "" $(ARGS)

compat: $(VENV)/.dev  ## the tests on the oldest and newest supported transformers, TRL and PEFT; ARGS=--all: slow ones too
	HF_HUB_OFFLINE=1 $(VENV)/bin/python tests/compat.py $(ARGS)

conformance: $(VENV)/.dev  ## transformers' and PEFT's own common suites on LaVIN, and on LLaVA and LoRA beside it
	$(VENV)/bin/python tests/conformance $(ARGS)

families: $(VENV)/.dev  ## every decoder and every tower of the installed transformers: docs/families.md
	HF_HUB_OFFLINE=1 $(VENV)/bin/python tests/families $(ARGS)

faults: $(VENV)/.dev  ## bad input, damaged files, kills, full disks, no network: outputs/faults/table.md says what happened
	HF_HUB_OFFLINE=1 LAVIN_FAULTS=1 $(VENV)/bin/python -m pytest -q -m "" tests/test_faults_*.py tests/test_soak.py $(ARGS)

quality: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/.docs  ## the pages of docs/ as a site in outputs/docs: index.html
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict $(ARGS)

bench: $(VENV)/.train
	$(VENV)/bin/python -m lavin.recipes.bench $(ARGS)

ablation: $(VENV)/.train  ## the paper's ablation on the tiny default, 12 runs, about 15 minutes on two cores
	$(VENV)/bin/python -m lavin.recipes.quickstart.ablation $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info

# An environment that holds an extra of pyproject.toml, at the versions of constraints.txt.
$(VENV)/.%: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e ".[$*]"
	touch $@
