# make demo | make test | make asan | make wheel | make cross: each does its own set-up in .venv. README.md shows what they print.
#
# Needs Python 3.10+ with venv and headers, a C++ compiler, and git or patch; .ci/setup names what is missing.
# TCA_SDIST=/path/llama_cpp_python-X.tar.gz builds without downloading the source; CMAKE_ARGS passes options on.

SHELL  := /bin/bash
PYTHON ?= python3
VENV   ?= .venv
export PYTHON VENV

SOURCES := CMakeLists.txt pyproject.toml $(shell find native cmake tca_gguf calib -type f -not -path '*/__pycache__/*')

.PHONY: help demo test asan dev wheel cross clean
help:
	@echo 'make demo   build, then dense against TCA on a small real model'
	@echo 'make test   build, then all tests of the Python package and the runtime'
	@echo 'make asan   the native tests under the address and undefined-behaviour sanitizers'
	@echo 'make dev    build for development: Python files are used from the checkout'
	@echo 'make wheel  dist/: one wheel that needs no compiler and runs on any x86-64 Linux'
	@echo 'make cross  the native tests for aarch64, cross-built and run by qemu-user'
	@echo 'make clean  remove build/ and $(VENV)/'

# One stamp for each set of extras: nothing is rebuilt while no source file is newer.
$(VENV)/installed-%: $(SOURCES)
	@.ci/setup package $*
	@touch $@

demo: $(VENV)/installed-plot
	@$(VENV)/bin/tca-gguf demo

test: $(VENV)/installed-test,plot,server
	@$(VENV)/bin/python native/scripts/upstream.py stat
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/pytest tests/unit tests/integration

asan:
	@.ci/setup asan

dev:
	@.ci/setup editable test,plot,server
	@rm -f $(VENV)/installed-*

wheel:
	@.ci/setup wheel

cross:
	@.ci/setup cross aarch64-linux-gnu

clean:
	rm -rf build $(VENV)
