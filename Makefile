# These need Python 3.10 or later, g++ and make, and nothing else:
#
#   make demo              pretrains on 22 photographs for a few minutes and draws what the network reconstructs
#   make demo-3d           the same on volumes, ellipsoids that it synthesises
#   make test              runs linters, type checker and tests
#   make docs              builds the documentation into build/docs; a warning is an error
#   make wheel-test        builds the wheel and tests it under another Python with another torch
#   make wheel-matrix      the same under three Pythons with three torches: 5 GB of disk for each
#   make sanitize          fuzzes the CPU operators in a build that checks addresses and undefined behaviour: ten minutes
#   make minkowski-test    compares with MinkowskiEngine, which it compiles first: ten minutes, once. It also needs
#                          OpenBLAS, and Python 3.10 or 3.11.
#
# All work in environments that they create, .venv first. To choose the Python: make test PYTHON=python3.12

PYTHON ?= python3
TORCH := torch==2.14.1 torchvision==0.29.2
TORCH_CUDA := 13
# Each is a Python, python<x.y> on the PATH or in pyenv, and a torch.
WHEEL_TEST := 3.13-2.13.0
WHEEL_MATRIX := 3.10-2.11.0 3.12-2.14.1 3.13-2.13.0
BIN := .venv/bin
READY := .venv/ready
WHEEL := build/wheel
MINKOWSKI := build/minkowski
RUN := runs/demo
RUN_3D := runs/demo-3d
PHANTOMS := runs/phantoms
# Two test files run at a time. On a GPU they run one after the other, because some tests read its memory and streams.
WORKERS := $(if $(wildcard /dev/nvidia0),,-n 2 --dist loadfile --no-loadscope-reorder)
CPP = $(shell find $(1) -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOURCES := $(call CPP,csrc)

# The CUDA operators are compiled where an nvcc fits this torch. Without a C++ compiler the build fails and says so;
# `make demo SPARSECNX_BUILD=none` runs in pure Python.
ifndef SPARSECNX_BUILD
  NVCC := $(shell $(PYTHON) csrc/compilers.py 2>&1)
  SPARSECNX_BUILD := $(if $(findstring release $(TORCH_CUDA).,$(shell '$(NVCC)' --version 2>&1)),cuda,cpu)
  $(info SPARSECNX_BUILD=$(SPARSECNX_BUILD) ($(NVCC)))
endif
export SPARSECNX_BUILD

.PHONY: demo demo-3d test docs sanitize wheel wheel-environment wheel-test wheel-matrix minkowski minkowski-test lint format clean

# The recipe for few images, in a run of minutes. A second `make demo` resumes an interrupted run.
demo: $(READY)
	$(BIN)/sparsecnx pretrain --model atto --image-size 224 --small-data --epochs 14 --output $(RUN) --resume auto
	$(BIN)/sparsecnx reconstruct $(RUN)/last.pt --out $(RUN)/reconstruction.png

demo-3d: $(READY)
	$(BIN)/python -m sparsecnx.train.phantoms $(PHANTOMS)
	$(BIN)/sparsecnx pretrain --data $(PHANTOMS) --model atto --image-size 64 --small-data --epochs 6 --output $(RUN_3D) --resume auto
	$(BIN)/sparsecnx reconstruct $(RUN_3D)/last.pt --out $(RUN_3D)/reconstruction.png

test: lint
	$(BIN)/pytest $(WORKERS)

docs: $(READY)
	rm -rf build/docs
	$(BIN)/sphinx-build -q -W --keep-going docs build/docs

# This is a package of its own: .venv keeps its operators. Sanitizers reserve more memory than the fuzzer's limit allows.
CALLS ?= 3000
SANITIZE := build/sanitize
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
sanitize: $(READY)
	rm -rf $(SANITIZE)
	SPARSECNX_BUILD=cpu CFLAGS='$(SANITIZERS)' LDFLAGS='$(SANITIZERS)' \
	  $(BIN)/python setup.py build --build-lib $(SANITIZE) --build-temp $(SANITIZE)/objects
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=2048 \
	  PYTHONPATH=$(SANITIZE) $(BIN)/python tests/fuzz_operators.py --calls $(CALLS) --unlimited

wheel-environment: $(WHEEL_TEST:%=$(WHEEL)/%/ready)

wheel-test: $(addprefix wheel-in-,$(WHEEL_TEST))

wheel-matrix: $(addprefix wheel-in-,$(WHEEL_MATRIX))

# It takes the object files of the install in .venv.
wheel: $(READY)
	rm -rf build/lib* build/bdist* dist
	$(BIN)/pip wheel . --no-deps --no-build-isolation --wheel-dir dist

# The tests run outside the source folder, so that they import the installed package.
wheel-in-%: wheel $(WHEEL)/%/ready
	$(WHEEL)/$*/bin/pip install --force-reinstall --no-deps dist/*.whl
	$(WHEEL)/$*/bin/pip install "$$(ls dist/*.whl)[train]"
	$(WHEEL)/$*/bin/sparsecnx doctor
	rm -rf $(WHEEL)/$*/tests && tar -c --exclude=__pycache__ tests pyproject.toml README.md | tar -x -C $(WHEEL)/$*
	cd $(WHEEL)/$* && bin/python tests/installed_wheel.py $(SPARSECNX_BUILD)
	cd $(WHEEL)/$* && bin/python tests/first_hour.py $(lastword $(subst -, ,$*))
	cd $(WHEEL)/$* && bin/pytest $(WORKERS) -k cpu tests/ops

.PRECIOUS: $(WHEEL)/%/ready
$(WHEEL)/%/ready: VERSION = $(firstword $(subst -, ,$*))
$(WHEEL)/%/ready:
	$(firstword $(wildcard $(HOME)/.pyenv/versions/$(VERSION).*/bin/python) python$(VERSION)) -m venv --clear $(WHEEL)/$*
	$(WHEEL)/$*/bin/pip install torch==$(lastword $(subst -, ,$*)) pytest pytest-timeout pytest-xdist hypothesis numpy
	touch $@

# MinkowskiEngine needs an older torch. The compiled operators of .venv work with that one too, so the tests run on the
# source folder as it is.
minkowski-test: $(READY) minkowski
	$(MINKOWSKI)/bin/python -c 'import sys, torch; from sparsecnx.backends import minkowski; \
	  sys.exit(minkowski.device_refusal(torch.device("cpu")))'
	$(MINKOWSKI)/bin/python -m pytest -m needs_minkowski

minkowski: $(MINKOWSKI)/ready

$(MINKOWSKI)/ready: tests/minkowski_engine.sh
	tests/minkowski_engine.sh $(PYTHON) $(MINKOWSKI)
	touch $@

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(call CPP,csrc tests)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(call CPP,csrc tests)

clean:
	rm -rf .venv build dist *.egg-info $(RUN) $(RUN_3D) $(PHANTOMS)
	rm -f sparsecnx/_C.*so sparsecnx/_C_cuda.*so sparsecnx/_build.json

$(READY): $(SOURCES) $(BIN)/python pyproject.toml setup.py
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install -e '.[train,test,dev,docs]'
	$(BIN)/sparsecnx doctor
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'sparsecnx needs Python 3.10 or later. Name one: make PYTHON=python3.12'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo 'This Python cannot make virtual environments. Debian, Ubuntu: apt-get install python3-venv'; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
