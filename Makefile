# Needs Python 3.11 or newer and make; everything else is installed under build/, which git ignores.
# An environment is rebuilt when the file that lists its packages changes, and left alone otherwise.

PYTHON ?= python3
WORKERS ?= 2
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check

# `override`: these folders are emptied when an environment is rebuilt, so no `make DEV=...` may point them
# at an environment that somebody else made.
override BASE := build/env/base
override DEV := build/env/dev
override BENCH := build/env/bench
override LOWEST := build/env/lowest
override LLAMA_CPP := build/llama.cpp
# Other releases of transformers than the development environment's, each pinned in requirements/transformers-*.txt.
TRANSFORMERS := 4.57 5.16
SOURCES := $(shell find src -type f -not -name '*.pyc')

.DELETE_ON_ERROR:
.PHONY: help demo test test-transformers lint format bench bench-pytorch bench-serving bench-throughput bench-training llama-server wheel lowest hooks clean base-environment

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(BASE)/.package  ## generate text from the bundled model, without PyTorch
	$(BASE)/bin/mbd generate --model storyteller --max-tokens 120 --seed 1 "Once upon a time"

# A file is one worker's: its fixtures are made once. Processes that tests start share the processors, too.
test: $(DEV)/.package  ## every test (PYTEST_ARGS="-k tokenizer" for some)
	$(DEV)/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-transformers: $(TRANSFORMERS:%=test-transformers-%)  ## the tests of the PyTorch classes with older releases of transformers

test-transformers-%: build/env/transformers-%/.package
	build/env/transformers-$*/bin/python -m pytest tests/pytorch src/modernbert_decoder/pytorch $(PYTEST_ARGS)

lint: $(DEV)/.package  ## ruff check, ruff format --check, mypy --strict
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy --strict src

format: $(DEV)/.package  ## let ruff fix and format
	$(DEV)/bin/ruff check --fix .
	$(DEV)/bin/ruff format .

bench: $(BENCH)/.package  ## the benchmarks, peers included (builds llama.cpp: needs a C++ compiler)
	$(BENCH)/bin/python benchmarks/run.py $(BENCH_ARGS)

bench-pytorch: $(BENCH)/.requirements  ## the PyTorch classes against transformers' (BENCH_ARGS="--quick")
	$(BENCH)/bin/python -m benchmarks.wing $(BENCH_ARGS)

# The speculation's page has a run of its own: it needs no other server.
bench-serving: $(BENCH)/.requirements $(LLAMA_CPP)/bin/llama-server  ## the server under load, against llama.cpp's and transformers' (needs cmake)
	$(BENCH)/bin/python -m benchmarks.serving $(BENCH_ARGS)

bench-throughput: $(BENCH)/.requirements  ## documents per second, against transformers' pipeline
	$(BENCH)/bin/python -m benchmarks.throughput $(BENCH_ARGS)

bench-training: $(BENCH)/.requirements  ## training against upstream's class in the same Trainer (BENCH_ARGS="--quick")
	$(BENCH)/bin/python -m benchmarks.training $(BENCH_ARGS)

wheel: $(DEV)/.package  ## build/dist/*.whl
	rm -rf build/dist
	$(DEV)/bin/python -m build --wheel --no-isolation --outdir build/dist . >/dev/null
	@ls build/dist/*.whl

lowest: $(LOWEST)/.package  ## generate text with the oldest dependencies that pyproject.toml allows
	$(LOWEST)/bin/mbd generate --model storyteller --max-tokens 20 --seed 1 "Once upon a time"

llama-server: $(LLAMA_CPP)/bin/llama-server  ## llama.cpp's server, a peer of `python -m benchmarks.serving` (needs cmake, a C++ compiler)

# From the sources that llama-cpp-python's own source package vendors.
$(LLAMA_CPP)/bin/llama-server: $(BENCH)/.requirements
	rm -rf $(LLAMA_CPP) && mkdir -p $(LLAMA_CPP)/source
	$(BENCH)/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(LLAMA_CPP) \
	  "llama-cpp-python==$$($(BENCH)/bin/python -c 'from importlib.metadata import version as v; print(v("llama-cpp-python"))')"
	tar -xzf $(LLAMA_CPP)/llama_cpp_python-*.tar.gz --strip-components 1 -C $(LLAMA_CPP)/source
	cmake -S $(LLAMA_CPP)/source/vendor/llama.cpp -B $(LLAMA_CPP) -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF \
	  -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_BUILD_MTMD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
	cmake --build $(LLAMA_CPP) --target llama-server --parallel

hooks: $(DEV)/.package  ## install the pre-commit hooks into this clone
	$(DEV)/bin/pre-commit install

clean:  ## remove build/ and caches
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

base-environment: $(BASE)/.package

# --- environments -----------------------------------------------------------------------------------------
# .requirements: the packages it needs are in place; .package: this project is installed as well.

# The base dependencies and nothing else; the package is installed as a user would, not editable.
# A change of pyproject.toml rebuilds the environment, a change of the sources only reinstalls the package.
$(BASE)/.package: pyproject.toml $(SOURCES)
	$(if $(filter pyproject.toml,$?),$(PYTHON) -m venv --clear $(BASE))
	$(BASE)/bin/python $(PIP_INSTALL) $(if $(filter pyproject.toml,$?),,--no-deps --force-reinstall) .
	touch $@

$(LOWEST)/.package: requirements/lowest.txt pyproject.toml $(SOURCES)
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python $(PIP_INSTALL) -c requirements/lowest.txt .
	touch $@

$(DEV)/.requirements: requirements/dev.txt
	$(PYTHON) -m venv --clear $(DEV)
	$(DEV)/bin/python $(PIP_INSTALL) -r requirements/dev.txt
	touch $@

# --no-deps, then `pip check`: the pins must satisfy pyproject.toml, and pip must not improve on them.
$(DEV)/.package: $(DEV)/.requirements pyproject.toml
	$(DEV)/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	$(DEV)/bin/python -m pip check
	touch $@

# --no-compile: most modules are never imported, and compiling them all takes as long as the tests. But compiling
# torchao causes warnings, which would be errors in the tests.
.PRECIOUS: build/env/transformers-%/.requirements build/env/transformers-%/.package
build/env/transformers-%/.requirements: requirements/transformers-%.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python $(PIP_INSTALL) --no-compile -r $<
	$(@D)/bin/python -W ignore -m compileall -q $(@D)/lib/python3*/site-packages/torchao
	touch $@

build/env/transformers-%/.package: build/env/transformers-%/.requirements pyproject.toml
	$(@D)/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	$(@D)/bin/python -m pip check
	touch $@

# torch and transformers are named in the same invocation, so that no other build of torch is resolved.
$(BENCH)/.requirements: requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv --clear $(BENCH)
	$(BENCH)/bin/python $(PIP_INSTALL) -c requirements/dev.txt torch==2.13.0 transformers==5.24.0 -e '.[bench]'
	touch $@

$(BENCH)/.package: $(BENCH)/.requirements
	touch $@
