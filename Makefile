# Sets up .venv, trains, tests, measures. `make help` lists the targets.
#
# PYTHON       the interpreter that .venv is made from; in `make gpu`, the one that has torch
# TORCH        a version of torch to run with instead of the tested one, in an environment of its own:
#              make test TORCH=2.11.0
# WITHOUT      a package to leave out of the environment of TORCH: make test TORCH=2.11.0 WITHOUT=torchvision
# TRAIN_ARGS   arguments of the trainer in `make train`; without any, ResNet-50 with LARS on digits
# BENCH_CSV    where `make bench` writes its figures
# BENCH_COMPARE  rows to hold its ratios against, such as benchmarks/results/cpu.csv
# GPU_OUT      where `make gpu` writes its page, figures and logs
# GPU_AGAIN    stages of `make gpu` to run though they were run before: GPU_AGAIN="rows grid", or all
# PYTHONS, TORCHES  interpreters and versions of torch that `make wheels` tries; WHEELS_ARGS, more arguments for it
# PYTEST_ARGS  more arguments for pytest in `make test`, `make test-all`, `make bench` and `make gpu`, such as PYTEST_ARGS="-k lamb"

PYTHON ?= python3
TORCH ?=
WITHOUT ?=
# Without --output each run gets a folder of its own: runs/digits-lars-1, -2, ...
TRAIN_ARGS ?=
PYTEST_ARGS ?=
BENCH_CSV ?= .benchmarks/run.csv
BENCH_COMPARE ?=
GPU_OUT ?= benchmarks/results/gpu
GPU_AGAIN ?=
PYTHONS ?= $(PYTHON)
TORCHES ?= 2.10.* 2.14.*
WHEELS_ARGS ?=

# The newest torch that has wheels for every Python of pyproject.toml, and the torchvision released with it.
LOCKED_TORCH := torch==2.14.1 torchvision==0.29.1
LOCK := requirements.lock

# One environment and one build of the extension serve every target; requirements.lock names each package.
TESTED := .venv
VENV := $(TESTED)$(if $(TORCH),-torch-$(TORCH))$(if $(WITHOUT),-without-$(WITHOUT))
RUN := $(VENV)/bin/python
READY := $(VENV)/.built
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)
CXX_SOURCES := $(filter %.cpp %.h %.cu %.cuh,$(SOURCES) $(shell find tests -type f))

ifneq ($(WITHOUT),)
ifeq ($(TORCH),)
$(error WITHOUT needs a TORCH: make test TORCH=2.14.1 WITHOUT=$(WITHOUT))
endif
endif

# Many containers set it. Then each process of the tests would compile the sources of torch anew: 18 s of
# CPU time, instead of 6, to import what the trainer imports.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all bench triton-code pictures docs gpu gpu-first gpu-test gpu-counters gpu-bench lint format lock dist wheels clean
.NOTPARALLEL:
# Only what is complete counts as made.
.DELETE_ON_ERROR:

help:
	@echo 'make train   train ResNet-50 with LARS on handwritten digits; writes a new folder in runs'
	@echo 'make test    run the tests that every change needs; with TORCH=2.11.0, under that torch'
	@echo 'make test-all  run all tests, as CI does'
	@echo 'make bench   time the optimizers beside others, and print one table'
	@echo 'make triton-code  compile the Triton kernels for GPUs that are not here, and write down what their code needs'
	@echo 'make pictures  draw the pictures of the documentation again, from benchmarks/results'
	@echo 'make docs    build the documentation site in .site'
	@echo 'make gpu     build for the GPU that is here, try, test and time it, without .venv or network,'
	@echo '             in 10 minutes; its parts: gpu-first (4 minutes), gpu-test, gpu-counters, gpu-bench'
	@echo 'make lint    check style and types'
	@echo 'make format  bring the sources into style'
	@echo 'make lock    choose the newest versions of all packages again, and write requirements.lock'
	@echo 'make dist    build, repair and try the sdist and the wheel of this Python in dist'
	@echo 'make wheels  build wheels with and without CUDA kernels, and try them under several Pythons and torches'
	@echo 'make setup   set up $(VENV), and nothing else'
	@echo 'make clean   remove what was built and cached; environments and runs stay'
	@echo
	@echo 'The first run sets up $(VENV); choose its Python with make PYTHON=/path/to/python3.'

setup: $(READY)

train: $(READY)
	$(RUN) -m fastlars.trainer $(TRAIN_ARGS)

# A cache for each environment: what the tests compile is kept there for the next run.
PYTEST := -m pytest -n 2 --dist loadgroup --benchmark-disable $(if $(TORCH),-o cache_dir=$(VENV)/.pytest_cache)

test: $(READY)
	$(RUN) $(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test-all: $(READY)
	$(RUN) $(PYTEST) $(PYTEST_ARGS)

bench: $(READY)
	@mkdir -p .benchmarks
	$(RUN) -m pytest benchmarks -m 'not gpu' --benchmark-json .benchmarks/run.json $(PYTEST_ARGS)
	@$(RUN) -m benchmarks.step.report .benchmarks/run.json --csv $(BENCH_CSV) --pictures .benchmarks \
	    $(if $(BENCH_COMPARE),--compare $(BENCH_COMPARE))

triton-code: $(READY)
	$(RUN) -m benchmarks.step.triton_code --out benchmarks/results/triton_code.csv

pictures: $(READY)
	$(RUN) -m benchmarks.pictures

docs: $(READY)
	$(RUN) -m sphinx -q -W --keep-going docs .site
	@echo 'the site: .site/index.html'

# Machines with GPUs come with a torch that fits them, and often without a network. Each part passes over
# what it has done before on this card with these sources.
gpu gpu-first gpu-test gpu-counters gpu-bench:
	@$(FIND_PYTHON)
	@$(PYTHON) -m benchmarks.gpu_proof $(or $(subst gpu-,,$(filter gpu-%,$@)),all) \
	    --python $(PYTHON) --out $(GPU_OUT) --again '$(GPU_AGAIN)' -- $(PYTEST_ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

# The wheel is built from the sdist, and what is tried is the wheel as it would be published. libgomp
# stays outside: torch brings one, and a second would be a pool of threads of its own.
dist: $(READY)
	rm -rf dist
	$(RUN) -m build --no-isolation --outdir dist .
	PATH="$(abspath $(VENV))/bin:$$PATH" $(RUN) -m auditwheel repair --exclude libgomp.so.1 -w dist dist/*.whl
	rm dist/*-linux_*.whl
	$(RUN) -m twine check --strict dist/*
	FASTLARS_WHEEL="$$(echo dist/*.whl)" $(RUN) -m pytest tests/package/test_wheel.py $(PYTEST_ARGS)
	@ls -l dist

# Downloads each torch that it tries: gigabytes.
wheels: $(READY)
	rm -rf dist/wheels
	$(RUN) .ci/wheels.py --out dist/wheels --pythons $(PYTHONS) --torches $(foreach t,$(TORCHES),'$t') $(WHEELS_ARGS)

clean:
	rm -rf build dist *.egg-info fastlars/*.so $(TESTED)/.built
	rm -rf .benchmarks .site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find fastlars tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

FIND_PYTHON = command -v $(PYTHON) >/dev/null || \
    { echo 'fastlars: $(PYTHON) was not found; choose a Python with make PYTHON=/path/to/python3' >&2; exit 1; }

# --no-deps: the lock names every package, and pip has nothing to choose. Python's own pip is old enough
# to need no network for itself.
INSTALL = -m pip install --disable-pip-version-check --no-deps --no-compile

$(TESTED)/.packages: $(LOCK)
	@$(FIND_PYTHON)
	@$(PYTHON) .ci/doctor.py
	@$(TESTED)/bin/python -c '' 2>/dev/null || { rm -rf $(TESTED) && $(PYTHON) -m venv $(TESTED); }
	$(TESTED)/bin/python $(INSTALL) --require-hashes -r $(LOCK)
	@touch $@

$(TESTED)/.built: $(TESTED)/.packages $(SOURCES)
	$(TESTED)/bin/python $(INSTALL) --no-build-isolation -e .
	@touch $@

ifneq ($(TORCH),)
# The lock's versions as far as this torch allows them, for this Python.
$(VENV)/.packages: $(TESTED)/.packages
	@rm -rf $(VENV) && $(TESTED)/bin/python -m venv $(VENV)
	@cp $(LOCK) $(VENV)/$(LOCK)
	@$(if $(WITHOUT),echo '$(WITHOUT); python_version < "3"') > $(VENV)/left-out
	echo 'torch==$(TORCH)' | $(COMPILE) --override $(VENV)/left-out -o $(VENV)/$(LOCK)
	$(RUN) $(INSTALL) --require-hashes -r $(VENV)/$(LOCK)
	@touch $@

# One build of the extension serves every torch: the editable install is copied, not made again.
$(VENV)/.built: $(VENV)/.packages $(TESTED)/.built
	@cp -r $(TESTED)/lib/python3*/site-packages/*fastlars[-_]* $(VENV)/lib/python3*/site-packages
	@touch $@
endif

# uv reads metadata alone: nothing is downloaded but that.
COMPILE = $(TESTED)/bin/python -m uv pip compile -q pyproject.toml - --all-extras --generate-hashes \
    --no-annotate --no-header --no-python-downloads

lock: $(TESTED)/.packages
	printf '%s\n' $(LOCKED_TORCH) | $(COMPILE) --upgrade --universal --python-version 3.10 -o $(TESTED)/$(LOCK)
	@{ echo "# Made by make lock on $$(date -u +%F): the versions that make train, test and docs install."; \
	    cat $(TESTED)/$(LOCK); } > $(LOCK).new && mv $(LOCK).new $(LOCK)
	@sed -i "s/\(requirements.lock.*\) of [0-9-]\{10\}/\1 of $$(date -u +%F)/" README.md
