# make help | env | demo | test | lint | bench | clean
#
# Settings, on the command line or in the environment:
#   PYTHON=python3.12    the interpreter that creates .venv (>= 3.10; the pinned environment needs >= 3.11)
#   TORCH_INDEX=URL      package index for torch alone. On the public index torch for Linux is the CUDA build;
#                        on a machine without a GPU set this to PyTorch's CPU wheel index to avoid CUDA wheels.
#   TORCH="torch==2.11"  the torch of a GPU machine [torch>=2.11,<2.14: what the tests have run on]; before .venv is made
#   DEMO_ARGS="..."      passed on to `make demo`
#   TEST_ARGS="..."      passed on to pytest [-n 2 --dist loadfile: two processes, a file of tests each at a time]
#   SUITE_ARGS="..."     passed on to `make gpu`

PYTHON      ?= python3
TORCH_INDEX ?=
TORCH       ?= torch>=2.11,<2.14
DEMO_ARGS   ?=
TEST_ARGS   ?= -n 2 --dist loadfile
SUITE_ARGS  ?=

VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.stamp
PIP   := $(PY) -m pip --disable-pip-version-check
# A container may show the device without nvidia-smi, and a machine may have the tool without /dev/nvidia0.
HAS_GPU := $(shell [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1 && echo 1)

.DEFAULT_GOAL := help
.PHONY: help env demo test lint bench gpu clean

help:
	@echo "make env     create .venv with everything (once; again when pyproject.toml or the pins change)"
	@echo "make demo    train a small Soundwave on synthesised speech on this machine and talk to it (DEMO_ARGS=...)"
	@echo "make test    lint, check the documentation, run the tests"
	@echo "make lint    ruff and the documentation check alone"
	@echo "make bench   time the ops against eager and the installed peers"
	@echo "make gpu     on a GPU machine: ceilings, GPU tests, benchmarks, tuning; resumable (SUITE_ARGS=--dry-run rehearses)"
	@echo "make clean   remove caches and build output (.venv and runs/ stay)"

env: $(STAMP)

# torch comes first and without its dependencies: if it is a CUDA build on a machine without a GPU, this stops before
# gigabytes of CUDA packages follow. On a GPU machine it brings its own triton, and its bounds on setuptools.
$(STAMP): pyproject.toml setup.py constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "make env: needs Python >= 3.10; '$(PYTHON)' is not. Set PYTHON=/path/to/python3" >&2; exit 2; }
	@[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
ifeq ($(HAS_GPU),1)
	@grep -vE '^(torch|triton|setuptools)==' constraints-cpu.txt > $(VENV)/constraints.txt
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
else
	@cp constraints-cpu.txt $(VENV)/constraints.txt
	$(PIP) install --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) 'torch==2.13.0'
	@$(call no_cuda,metadata.requires("torch") or [])
endif
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make env: the pins need Python >= 3.11; on this Python versions are chosen by pip" >&2; \
	  grep -E '^torch==' $(VENV)/constraints.txt > $(VENV)/torch.txt || true; \
	  mv $(VENV)/torch.txt $(VENV)/constraints.txt; }
	$(PIP) install -c $(VENV)/constraints.txt -e '.[model,train,demo,dev]'
ifneq ($(HAS_GPU),1)
	@$(call no_cuda,[d.metadata["Name"] for d in metadata.distributions()])
endif
	@touch $@

# $(call no_cuda,PYTHON LIST OF NAMES): fails, and takes torch out again, if a CUDA package is among them.
no_cuda = $(PY) -c 'import sys; from importlib import metadata; \
  sys.exit(any((n or "").lower().startswith(("nvidia-", "cuda-")) for n in $(1)))' || { \
  $(PIP) uninstall -q -y torch; \
  echo "make env: this index serves the CUDA build of torch, but there is no GPU here:" \
    "set TORCH_INDEX to the index of PyTorch's CPU wheels and run make env again" >&2; exit 2; }

demo: env
	$(PY) -m train.nano.demo $(DEMO_ARGS)

test: env lint
	$(PY) -m pytest tests -q $(TEST_ARGS)

lint: env
	$(PY) -m ruff check .
	@if [ -f tests/repo/docs_check.py ]; then $(PY) -m tests.repo.docs_check; fi

bench: env
	$(PY) -m pytest bench/ --benchmark-only

gpu: env
	$(PY) -m bench.gpu_suite $(SUITE_ARGS)

clean:
	rm -rf build dist .pytest_cache .ruff_cache .benchmarks *.egg-info
	find csrc_triton soundwave_fast train bench tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
