# make shakespeare   set up, download the text, train for five minutes, generate samples
# make test          set up, lint and type-check, run all tests
# make test-full     the same, with larger grids for the kernels
# make torture       kill a run 250 times, damage its files, full disks, hostile texts: over a thousand cases
# make check         set up, lint, format check, type check
# make ... PYTHON=python3.12 creates the virtual environment with that Python.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOG := $(VENV)/install.log

.PHONY: shakespeare test test-full torture check

# Continues an interrupted run; of a finished run it only generates samples.
shakespeare: $(VENV)/ready
	@resume=$$(test -f runs/shakespeare/latest && echo --resume); $(BIN)/python train.py shakespeare $$resume
	@$(BIN)/python sample.py --run runs/shakespeare --prompt "ROMEO:" --num-samples 3 --max-new-tokens 150 --whole-lines

test: check
	@rm -f .coverage*
	@OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n auto
	@$(BIN)/coverage combine -q
	@$(BIN)/coverage report

test-full: check
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m "full or not full"

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

# Make the virtual environment and install $(1) into it; when that fails, say in one line why.
define install
fail() { echo "heed: $$1" >&2; exit 1; }; \
command -v $(PYTHON) > /dev/null || fail "there is no $(PYTHON) here: it needs Python 3.11 or newer"; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 ..."; \
test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) > /dev/null 2>&1 \
  || { rm -rf $(VENV); fail "$(PYTHON) -m venv $(VENV) failed: is the disk full, or is the package python3-venv missing?"; }; \
echo "heed: installing into $(VENV), some minutes the first time ..."; \
$(BIN)/pip install --disable-pip-version-check -c requirements.txt -e '$(1)' > $(LOG) 2>&1 || { \
  grep -qi "no space left" $(LOG) && fail "the disk is full: an installation takes 3 GB, or 8 GB with CUDA"; \
  grep -qiE "connection|resolve|network|timed out|retrying|no matching distribution" $(LOG) \
    && fail "the packages could not be downloaded: is there a network? pip said: $$(grep ERROR $(LOG) | tail -n 1)"; \
  fail "pip failed: $$(grep ERROR $(LOG) | tail -n 1) (all of it: $(LOG))"; }; \
touch $@
endef
