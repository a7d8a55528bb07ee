# make shakespeare   set up, download the text, train for five minutes, generate samples
# make zoo           compare attention with its alternatives in 15 minutes on two cores, see python -m benchmarks zoo
# make test          set up, lint and type-check, run all tests
# make test-full     the same with larger parameter grids for the kernel tests
# make coverage      make test, and the lines that no test runs
# make torture       kill a run 250 times, damage its files, full disks, hostile texts: over a thousand cases
# make check         set up, lint, check the format, type-check
# make ... PYTHON=python3.12 creates the virtual environment with that Python.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOG := $(VENV)/install.log

.PHONY: shakespeare zoo test test-full coverage torture check

# Resumes an interrupted run. If the run is finished, only generates samples.
shakespeare: $(VENV)/ready
	@resume=$$(test -f runs/shakespeare/latest && echo --resume); $(BIN)/python train.py shakespeare $$resume
	@$(BIN)/python sample.py --run runs/shakespeare --prompt "ROMEO:" --num-samples 3 --max-new-tokens 150 --whole-lines

# Results are kept in zoo-results/short: a second call continues where the time was over.
zoo: $(VENV)/ready
	@$(BIN)/python -m benchmarks zoo --short --minutes 15

test: check
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

test-full: check
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m "full or not full"

coverage: check
	@rm -f .coverage*
	@OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n auto
	@$(BIN)/coverage combine -q
	@$(BIN)/coverage report

torture: check
	@OMP_NUM_THREADS=1 $(BIN)/pytest -s -m "full or not full" tests/torture

check: $(VENV)/ready-dev
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check .
	@$(BIN)/mypy

$(VENV)/ready: requirements.txt pyproject.toml
	@$(call install,.)

$(VENV)/ready-dev: requirements.txt pyproject.toml
	@$(call install,.[dev])
	@touch $(VENV)/ready

# Create the virtual environment and install $(1) into it. A failure prints its reason in one line.
define install
fail() { echo "heed: $$1" >&2; exit 1; }; \
command -v $(PYTHON) > /dev/null || fail "$(PYTHON) not found: Python 3.11 or newer is required"; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 ..."; \
test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) > /dev/null 2>&1 \
  || { rm -rf $(VENV); fail "$(PYTHON) -m venv $(VENV) failed: is the disk full, or is the package python3-venv missing?"; }; \
echo "heed: installing into $(VENV), takes several minutes the first time ..."; \
$(BIN)/pip install --disable-pip-version-check -c requirements.txt -e '$(1)' > $(LOG) 2>&1 || { \
  grep -qi "no space left" $(LOG) && fail "the disk is full: the installation needs 3 GB, or 8 GB with CUDA"; \
  grep -qiE "connection|resolve|network|timed out|retrying|no matching distribution" $(LOG) \
    && fail "the packages could not be downloaded, check the network connection: $$(grep ERROR $(LOG) | tail -n 1)"; \
  fail "pip failed: $$(grep ERROR $(LOG) | tail -n 1) (full log: $(LOG))"; }; \
touch $@
endef
