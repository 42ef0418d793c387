# `make demo` and `make test` are all that a fresh machine needs: Linux with Python 3.11, pip and make.
# Both install the pinned environment into .venv first, once; a later call starts at once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test test-full bench-engine bench-scaling bench-learning bench-accuracy bench-defenses bench-gpu lint clean

help:
	@echo "make demo       learn a trigger, poison, pretrain and report, on embedded data"
	@echo "make test       lint, types, import layers, and every test that is not minutes long"
	@echo "make test-full  the tests that are minutes long"
	@echo "make bench-engine    speed against lightly on CIFAR-10, about 20 minutes"
	@echo "make bench-scaling   speed and memory over batch, width, resolution, images and processes, under 15 minutes"
	@echo "make bench-learning  does the fast engine learn as much as plain torch?, about 30 minutes"
	@echo "make bench-accuracy  kNN accuracy against minutes, the 30-minute recipe and lightly's model, about 65 minutes"
	@echo "make bench-defenses  what is not measured yet of defenses on the committed encoders, hours; goes on after a stop"
	@echo "make bench-gpu       speed on a GPU against lightly's model, about 15 minutes; needs no data"
	@echo "make lint       ruff, mypy and the import layers alone"
	@echo "make clean      remove .venv and every cache; runs/ stays"

demo: $(STAMP)
	$(BIN)/blto demo

test: lint
	@echo "==> BLTO_DATA is '$$BLTO_DATA'; where it is empty, the tests on real CIFAR-10 are listed below as skipped"
	$(BIN)/python -m pytest -n $(WORKERS) -m "not full"

test-full: $(STAMP)
	@echo "==> BLTO_DATA is '$$BLTO_DATA'; where it is empty, the tests on real CIFAR-10 are listed below as skipped"
	$(BIN)/python -m pytest -m full

# Benchmarks need a quiet machine and, except for bench-scaling, CIFAR-10 in BLTO_DATA.
bench-engine: $(STAMP)
	$(BIN)/python -m benchmarks.engine

bench-scaling: $(STAMP)
	$(BIN)/python -m benchmarks.scaling

bench-accuracy: $(STAMP)
	$(BIN)/python -m benchmarks.accuracy_over_time

bench-defenses: $(STAMP)
	$(BIN)/python -m benchmarks.detectors
	$(BIN)/python -m benchmarks.class_reach
	$(BIN)/python -m benchmarks.landing
	$(BIN)/python -m benchmarks.filters
	$(BIN)/python -m benchmarks.repairs
	$(BIN)/python -m benchmarks.retraining

bench-gpu:
	benchmarks/gpu.sh

bench-learning: $(STAMP)
	$(BIN)/python -m benchmarks.equal_learning

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The stamp is written last: an install that fails or is interrupted leaves none, and the next call starts it again.
$(STAMP): constraints.txt pyproject.toml $(wildcard src/blto/models/native/*.cpp src/blto/models/native/*.h)
	@echo "==> installing the pinned environment into $(VENV) (minutes the first time)"
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("blto needs Python 3.11: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps -r constraints.txt
	$(PIP) install --no-deps --no-build-isolation -e .
	$(PIP) check
	@touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	rm -f src/blto/models/native/_kernels*.so
	find $(wildcard src tests benchmarks examples) -name __pycache__ -type d -prune -exec rm -rf {} +
