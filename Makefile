# One environment, .venv, built from requirements/*.lock; a stamp in it says that an install came to its end,
# so an interrupted one is simply taken up again by the next `make`.
PYTHON ?= python3
PRESET ?= cpu
FIGURES ?= fig_controls,fig_dynamics,fig_passk
DRAWS ?= 8
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
# An index with PyTorch's build for CPUs ("Get Started" on its site names one): the default build of the same
# version brings 4 GB of CUDA along.
TORCH_INDEX ?=
# For tests on a busy machine: Ray's workers do not give way to all other work, its dashboard may take its time.
# The notebook that starts a Ray with all its parts runs alone.
RAY := RAY_worker_niceness=0 RAY_DASHBOARD_STARTUP_TIMEOUT_S=600

.DEFAULT_GOAL := setup
.PHONY: setup dev help reproduce test test-faults test-verl prepare lab docs bench gpu clean

setup: .venv/.cpu ## the environment that runs everything (default)
dev: .venv/.dev ## the same, with notebooks, tests, docs, Ray and vLLM

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

reproduce: .venv/.cpu ## the headline figures, from nothing (PRESET=cpu; FIGURES= for all of them, an evening)
	$(BIN)/stars reproduce --preset $(PRESET) $(if $(FIGURES),--only "$(FIGURES)" --set eval.draws=$(DRAWS))

test: .venv/.dev .venv-browser/.done ## form and exports, then every notebook runs, every test passes
	tests/drift.sh
	$(RAY) OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing \
	    --skip_folder_re '^(figures$$|[_.])' --skip_file_re '^([_.]|cluster)'
	$(RAY) OMP_NUM_THREADS=1 $(BIN)/nbdev_test --timing --path nbs/tutorials/cluster.ipynb
	$(BIN)/python -m pytest

test-faults: .venv/.dev ## every write, flush, rename and unlink of fifteen commands fails once, in four ways (Linux; an hour)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults.py

test-verl: .venv/.dev .venv-verl/.done ## exports for verl, under verl's own code (in an environment of its own)
	rm -rf build/verl
	$(BIN)/python tests/verl/export.py build/verl
	STARS_VERL=build/verl .venv-verl/bin/python -m pytest -q -W ignore tests/verl/check_export.py

prepare: .venv/.dev ## clean and format the notebooks, export the modules, write README.md, look for mistakes
	PATH="$(CURDIR)/$(BIN):$$PATH" .ci/prepare
	$(BIN)/ruff check

lab: .venv/.lab ## open the notebooks (LABFLAGS=...); some chapters need more: make dev
	$(BIN)/jupyter lab --notebook-dir=. nbs/index.ipynb $(LABFLAGS)

docs: .venv/.dev .venv-browser/.done ## the site, in _docs
	$(BIN)/python .ci/docs.py

bench: .venv/.dev ## the speed comparisons
	set -e; for f in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do echo "== $$f"; $(BIN)/python "$$f"; done

gpu: .venv-gpu/.done ## on one card, nine minutes: speed, memory, vLLM, time for every figure; benchmarks/results/gpu.md (GPUFLAGS=)
	.venv-gpu/bin/python benchmarks/gpu.py $(GPUFLAGS)

clean: ## drop what can be built again, but no runs
	rm -rf build dist *.egg-info _docs

.venv/.lock: requirements/cpu.lock
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("the locks need Python 3.11 or newer: make PYTHON=...")'
	@echo "installing PyTorch and the rest of requirements/cpu.lock into .venv: 6 GB (2 with TORCH_INDEX), a few minutes"
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(PIP) --no-deps --index-url $(TORCH_INDEX) "$$(grep '^torch==' $<)")
	$(PIP) -r $<
	@touch $@

.venv/.cpu: .venv/.lock setup.py settings.ini
	$(PIP) --no-deps -e .
	@touch $@
	@echo "source .venv/bin/activate puts stars and python on your path"

.venv/.lab: requirements/lab.lock .venv/.cpu
	@echo "installing JupyterLab into .venv"
	$(PIP) --no-deps -r $<
	@touch $@

.venv/.dev: requirements/dev.lock .venv/.cpu
	@echo "installing notebooks, tests, docs, Ray and vLLM into .venv: 2 GB more, some minutes"
	$(PIP) --no-deps -r requirements/dev.lock
	@touch $@

.venv-gpu/.done: requirements/gpu.lock setup.py settings.ini
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("the locks need Python 3.11 or newer: make PYTHON=...")'
	@echo "installing PyTorch for CUDA, vLLM and the rest of requirements/gpu.lock into .venv-gpu: several GB"
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install -q --disable-pip-version-check --no-deps -r requirements/gpu.lock
	.venv-gpu/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

# Python for the page of the site that runs in the reader's browser. Without npm
# nothing runs in that page: it shows the notebook, and the first page has no button for it.
.venv-browser/.done: requirements/browser.lock requirements/package.json requirements/package-lock.json .venv/.dev
	@if ! command -v npm >/dev/null; then echo "npm is not here, so the site goes without Python in the browser"; else \
	    rm -rf .venv-browser && mkdir -p .venv-browser && \
	    cp requirements/package.json requirements/package-lock.json .venv-browser && \
	    npm ci --prefix .venv-browser --ignore-scripts --no-audit --no-fund --loglevel error && \
	    $(BIN)/python -m pip download -q --disable-pip-version-check --no-deps --only-binary :all: \
	        --python-version 3.14 -r requirements/browser.lock -d .venv-browser/wheels && touch $@; fi

.venv-verl/.done: requirements/verl.lock
	$(PYTHON) -m venv .venv-verl
	.venv-verl/bin/python -m pip install -q --disable-pip-version-check $$(grep '^torch==' requirements/verl.lock)
	.venv-verl/bin/python -m pip install -q --disable-pip-version-check --no-deps -r requirements/verl.lock
	@touch $@
