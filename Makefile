# On a machine with Python 3.10 or later, g++ and make, nothing else installed:
#
#   make demo    pretrain on two dozen photographs for a few minutes and draw what the network reconstructs
#   make test    everything that has to hold before a change is kept
#
# Both work in .venv, which they create. Another Python: make test PYTHON=python3.12

PYTHON ?= python3
TORCH := torch==2.14.1 torchvision==0.29.2
BIN := .venv/bin
READY := .venv/ready
RUN := runs/demo
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# A machine that cannot compile is told so; `make demo SPARSECNX_BUILD=none` goes on in pure Python.
export SPARSECNX_BUILD ?= cpu

.PHONY: demo test lint format clean

# The published recipe, but for a learning rate that suits a run of minutes. Interrupted, it goes on.
demo: $(READY)
	$(BIN)/sparsecnx pretrain --model atto --image-size 224 --epochs 14 --batch-size 8 --base-lr 0.03 --output $(RUN) --resume
	$(BIN)/sparsecnx reconstruct $(RUN)/last.pt --out $(RUN)/reconstruction.png

test: lint
	$(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(SOURCES)

clean:
	rm -rf .venv build dist *.egg-info $(RUN) sparsecnx/_C.*so sparsecnx/_build_info.*so sparsecnx/_build_failure.txt

$(READY): $(SOURCES) $(BIN)/python pyproject.toml setup.py
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install -e '.[train,test,dev]'
	$(BIN)/sparsecnx doctor
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'sparsecnx needs Python 3.10 or later. Name one: make PYTHON=python3.12'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo 'This Python cannot make virtual environments. Debian, Ubuntu: apt-get install python3-venv'; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
