# make demo      train MoCoOp on the packaged demo, compare it with zero-shot CLIP
# make demo-all  every method that learns, and zero-shot: over the demo's three draws with mean and deviation, and those
#                on kept features (caches, probes) at 1 to 16 shots
# make demo-test-time  test-time methods on styles that were held out, beside zero-shot
# make demo-meta a start and a gradient regulator learned across tasks (GRAM-R), and what they are worth
# make test      the test suite; of tests of every pair (method and objective, ...) a covering design
# make test-all  the test suite with all pairs
# make lint      ruff and mypy
# make venv      what they share: .venv with vlprompt (editable) and the development tools
# Another interpreter: make venv PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
METHODS := coop mocoop cocoop kgcoop prograd vpt ivlp maple promptsrc restore dept_lowrank ept clip_adapter clip_lora ramt apt_approximated \
	visual_prompt upt promptkd
CACHES := tip_adapter tip_adapter_f tfup tfup_t ape gda taskres linear_probe lp_plus_plus
TEST_TIME := tpt difftpt tda mta zero
META := coop ivlp
STAMP := .venv/installed

# One thread per process: the suite runs one process per core, and small tensors gain nothing from more threads.
# A whole file goes to one process, so that what its fixtures trained is trained once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

.PHONY: venv demo demo-all demo-test-time demo-meta test test-all lint

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
	$(BIN)/vlprompt eval --protocol few-shot $(patsubst %,--config configs/%/demo.yaml,$(CACHES)) \
		--datasets demo --shots 1,2,4,8,16 --seeds 1

demo-test-time: $(STAMP)
	$(BIN)/python tools/domains.py $(patsubst %,--config configs/%/demo.yaml,$(TEST_TIME)) \
		--data.name demo-styles --protocol leave-one-out --seeds 1

demo-meta: $(STAMP)
	for host in $(META); do $(BIN)/python tools/meta_train.py --config configs/gram/$$host-demo.yaml || exit; done
	$(BIN)/vlprompt meta-eval $(patsubst %,runs/gram/%-demo-pairs-unseen,$(META)) \
		$(patsubst %,--config configs/%/demo.yaml,$(META)) --data.name demo-2 --shots 1,2,4 --seeds 1,2,3,4,5

test: $(STAMP)
	$(PYTEST)

test-all: $(STAMP)
	$(PYTEST) --all-pairs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
