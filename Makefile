# `make help` says what there is. Every target sets up .venv first, and that does nothing the second time.
FIG ?= A2
SYSTEM ?= 1
export PYTHON SYSTEM TORCH

python := .venv/bin/python
reproduce_flags = --fig $(FIG) $(if $(PRESET),--preset $(PRESET)) $(if $(DATA),--data '$(DATA)') \
	$(if $(OUT),--out '$(OUT)') $(if $(STORE),--store '$(STORE)') $(ARGS)

.PHONY: help setup reproduce test test-all lint docs bench test-gpu constraints clean
.DEFAULT_GOAL := help

help:
	@echo "make reproduce FIG=A2   set up, then run a figure (or all): PRESET=smoke|quick|paper DATA=... OUT=... STORE=... ARGS='...'"
	@echo "make test               set up, then run every kind of test once: ARGS='-k masks'"
	@echo "make test-all           the same, and the slow tests"
	@echo "make lint               ruff, mypy and import-linter"
	@echo "make docs               build the documentation site in build/docs: open build/docs/index.html"
	@echo "make bench              the benchmarks of bench/: ARGS='bench/bench_crop.py --device cuda'"
	@echo "make test-gpu           checks, then times everything on a CUDA machine: ARGS='--only checks --cache FOLDER'"
	@echo "make setup              only set up .venv (scripts/setup.sh --plan says what that would install)"
	@echo "make constraints        resolve constraints.txt anew from pyproject.toml"
	@echo "make clean              delete .venv, builds and caches; results and stores stay"
	@echo
	@echo "With each: SYSTEM=0 installs no system packages; PYTHON=python3.12 chooses the Python,"
	@echo "TORCH=cpu a build of torch for CPUs, a tenth of the download (the first time, and it stays)."

setup:
	@scripts/setup.sh

reproduce: setup
	$(python) scripts/reproduce.py $(reproduce_flags)

# One thread a process: two workers on two cores are faster than two threads, and results are equal at equal counts.
test test-all bench: export OMP_NUM_THREADS = 1
test test-all bench: export OMP_WAIT_POLICY = passive
# Compiled once for all processes of a run, and anew in the next: numba's cache does not see changes in what a function
# calls. The second time the kernels' Triton code itself runs, interpreted: a process cannot do both.
test test-all: export NUMBA_CACHE_DIR = $(CURDIR)/.venv/numba
test: setup
	rm -rf .venv/numba
	$(python) -m pytest -n 2 --dist loadgroup -m "not slow" $(ARGS)
	TRITON_INTERPRET=1 $(python) -m pytest -n 2 -m "not slow" tests/kernels

test-all: test docs
	$(python) -m pytest -n 2 --dist loadgroup -m slow $(ARGS)

bench: setup
	$(python) -m pytest $(if $(findstring bench/bench_,$(ARGS)),,bench) --benchmark-enable $(ARGS)

test-gpu: setup
	$(python) bench/gpu.py $(ARGS)

lint: setup
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	.venv/bin/lint-imports

# Strict: a warning fails it, and so does a link within the site that leads nowhere (docs/conf.py). From nothing each
# time, as Sphinx's check of a page is skipped where it has not changed.
docs: setup
	rm -rf build/docs
	$(python) -m sphinx --quiet --fail-on-warning --builder html --conf-dir docs --doctree-dir build/doctrees --fresh-env . build/docs
	@echo "docs: open build/docs/index.html"

# One version of each package for every Python that is supported, so that results do not differ by it.
constraints: setup
	$(python) -m uv pip compile --quiet --universal --fork-strategy fewest --python-version 3.11 --all-extras --upgrade \
		--no-header --no-annotate pyproject.toml --output-file constraints.txt

clean:
	@if [ -e .venv/.fastprune-setup ]; then rm -rf .venv; fi
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
	find fastprune kernels loaders scripts bench tests -name __pycache__ -prune -exec rm -rf {} +
