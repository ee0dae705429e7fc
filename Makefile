# make demo      train MoCoOp on the packaged demo, compare it with zero-shot CLIP
# make demo-all  zero-shot, CoOp and MoCoOp over the demo's three draws, with mean and deviation
# make test      the whole test suite
# make lint      ruff and mypy
# make venv      what they share: .venv with vlprompt (editable) and the development tools
# Another interpreter: make venv PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
METHODS := coop mocoop
STAMP := .venv/installed

# One thread per process: the suite runs one process per core, and small tensors gain nothing from more threads.
# A whole file goes to one process, so that what its fixtures trained is trained once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

.PHONY: venv demo demo-all test lint

venv: $(STAMP)

# Runs again only when what it installs has changed.
$(STAMP): pyproject.toml setup.cfg setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'vlprompt needs Python 3.10 or newer; name one: make venv PYTHON=python3.12'; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python tools/train.py --config configs/mocoop/demo.yaml

demo-all: $(STAMP)
	$(BIN)/python tools/base_to_new.py $(patsubst %,--config configs/%/demo.yaml,$(METHODS)) \
		--datasets demo,demo-2,demo-3 --seeds 1

test: $(STAMP)
	$(PYTEST)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
