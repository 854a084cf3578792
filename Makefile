# make help | env | demo | test | contract | lint | bench | aot | gpu | clean
#
# Settings, on the command line or in the environment:
#   VERSIONS=newest      what to install, each in an environment of its own: pinned (the default, .venv), newest (the
#                        newest releases that pyproject.toml allows, resolved at that moment, .venv-newest), oldest
#                        (constraints-oldest.txt, .venv-oldest). Every target takes it.
#   PYTHON=python3.12    the interpreter that creates .venv (>= 3.10; the pinned environment needs >= 3.11)
#   TORCH_INDEX=URL      package index for torch alone. On the public index torch for Linux is the CUDA build;
#                        on a machine without a GPU set this to PyTorch's CPU wheel index to avoid CUDA wheels.
#   CUDA_BUILD=1         take a CUDA build of torch, gigabytes of it, on a machine without a GPU (once: it is remembered)
#   TORCH="torch==2.11"  the torch of VERSIONS=pinned on a GPU machine [torch>=2.11,<2.14]; before .venv is made
#   DEMO_ARGS="..."      passed on to `make demo`
#   TEST_ARGS="..."      passed on to pytest [two processes, a file of tests each at a time, the longest files first]
#   SUITE_ARGS="..."     passed on to `make gpu`

PYTHON      ?= python3
TORCH_INDEX ?=
CUDA_BUILD  ?=
VERSIONS    ?= pinned
DEMO_ARGS   ?=
TEST_ARGS   ?= -n 2 --dist loadfile --no-loadscope-reorder
SUITE_ARGS  ?=

# TORCH: on a GPU machine; TORCH_CPU: elsewhere.
ifeq ($(VERSIONS),pinned)
  VENV := .venv
  CONSTRAINTS := constraints-cpu.txt
  TORCH ?= torch>=2.11,<2.14
  TORCH_CPU := torch==2.13.0
else ifeq ($(VERSIONS),oldest)
  VENV := .venv-oldest
  CONSTRAINTS := constraints-oldest.txt
  TORCH := torch==2.11.0
  TORCH_CPU := $(TORCH)
else ifeq ($(VERSIONS),newest)
  VENV := .venv-newest
  CONSTRAINTS := /dev/null
  TORCH := torch>=2.11
  TORCH_CPU := $(TORCH)
  UPGRADE := --upgrade --upgrade-strategy eager
  NOW := FORCE
else
  $(error VERSIONS=$(VERSIONS): one of pinned, newest, oldest)
endif
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.stamp
PIP   := $(PY) -m pip --disable-pip-version-check
# A container may show the device without nvidia-smi, and a machine may have the tool without /dev/nvidia0.
HAS_GPU := $(shell [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1 && echo 1)
CUDA_OK := $(or $(HAS_GPU),$(filter 1,$(CUDA_BUILD)),$(wildcard $(VENV)/.cuda_build))

.DEFAULT_GOAL := help
.PHONY: help env demo test contract lint bench aot gpu clean FORCE

help:
	@echo "make env     create .venv with everything (once; again when pyproject.toml or the pins change)"
	@echo "make demo    train a small Soundwave on synthesised speech on this machine and talk to it (DEMO_ARGS=...)"
	@echo "make test    lint, check the documentation, run the tests (VERSIONS=newest|oldest: on other releases)"
	@echo "make contract  the basics on the newest transformers, peft and NumPy, beside the pinned torch"
	@echo "make lint    ruff and the documentation check alone"
	@echo "make bench   time the ops against eager and the installed peers"
	@echo "make aot     compile every kernel for seven chips without a GPU and record what each needs"
	@echo "make gpu     on a GPU machine: ceilings, GPU tests, benchmarks, tuning; resumable (SUITE_ARGS=--dry-run rehearses)"
	@echo "make clean   remove caches and build output (environments and runs/ stay)"

env: $(STAMP)

# torch comes first and without its dependencies: if it is a CUDA build on a machine without a GPU, this stops before
# gigabytes of CUDA packages follow. On a GPU machine it brings its own triton, and its bounds on setuptools.
$(STAMP): pyproject.toml setup.py constraints-cpu.txt constraints-oldest.txt $(NOW)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "make env: needs Python >= 3.10; '$(PYTHON)' is not. Set PYTHON=/path/to/python3" >&2; exit 2; }
	@[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	@[ "$(CUDA_BUILD)" != 1 ] || touch $(VENV)/.cuda_build
ifeq ($(HAS_GPU),1)
	@grep -vE '^(torch|triton|setuptools)==' $(CONSTRAINTS) > $(VENV)/constraints.txt || true
	$(PIP) install $(UPGRADE) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
else
	@cat $(CONSTRAINTS) > $(VENV)/constraints.txt
	$(PIP) install $(UPGRADE) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH_CPU)'
	@$(call no_cuda,metadata.requires("torch") or [])
endif
ifeq ($(VERSIONS),pinned)
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make env: the pins need Python >= 3.11; on this Python versions are chosen by pip" >&2; \
	  grep -E '^torch==' $(VENV)/constraints.txt > $(VENV)/torch.txt || true; \
	  mv $(VENV)/torch.txt $(VENV)/constraints.txt; }
endif
	$(PIP) install $(UPGRADE) -c $(VENV)/constraints.txt -e '.[model,train,demo,dev]'
	@$(call no_cuda,[d.metadata["Name"] for d in metadata.distributions()])
	@touch $@

# $(call no_cuda,PYTHON LIST OF NAMES): where a CUDA build was not asked for, fails, and takes torch out again, if a
# CUDA package is among them.
no_cuda = [ -n "$(CUDA_OK)" ] || $(PY) -c 'import sys; from importlib import metadata; \
  sys.exit(any((n or "").lower().startswith(("nvidia-", "cuda-")) for n in $(1)))' || { \
  $(PIP) uninstall -q -y torch; \
  echo "make env: this index serves the CUDA build of torch, but there is no GPU here:" \
    "set TORCH_INDEX to the index of PyTorch's CPU wheels, or CUDA_BUILD=1 to take it all the same" >&2; exit 2; }

demo: env
	$(PY) -m train.nano.demo $(DEMO_ARGS)

test: env lint
	$(PY) -m pytest tests -q $(TEST_ARGS)

lint: env
	$(PY) -m ruff check .
	@if [ -f tests/repo/docs_check.py ]; then $(PY) -m tests.repo.docs_check; fi

# The newest transformers, peft and NumPy in an environment that sees the pinned one behind its own packages.
CONTRACT := .venv-contract
contract: env
	@rm -rf $(CONTRACT) && $(PY) -m venv --without-pip $(CONTRACT)
	@$(CONTRACT)/bin/python -m tests.contract.newest $(VENV)
	@$(CONTRACT)/bin/python -m pytest tests/contract

bench: env
	$(PY) -m pytest bench/ --benchmark-only

aot: env
	$(PY) -m bench.aot --record bench/results/aot.json
	$(PY) -m bench.report

gpu: env
	$(PY) -m bench.gpu_suite $(SUITE_ARGS)

clean:
	rm -rf build dist .pytest_cache .ruff_cache .benchmarks *.egg-info
	find csrc_triton soundwave_fast train bench tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
