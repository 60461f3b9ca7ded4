# Every target does the set-up it needs; a step runs again only when what it is made from changed.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:

# rustup puts cargo here, and a shell that was open before does not know it yet.
export PATH := $(HOME)/.cargo/bin:$(PATH)
# One interpreter for every build of the extension, or cargo builds it once for each.
export PYO3_PYTHON := $(CURDIR)/.venv/bin/python

PYTHON := .venv/bin/python
RUN := .venv/.installed-run
DEV := .venv/.installed-dev
PACKAGE := src/diapause/_core.abi3.so
AGENT := src/diapause/native/diapause-agent
LAUNCH := src/diapause/native/diapause-launch
PAGER := src/diapause/native/diapause-pager
TRACKER := src/diapause/native/libdiapause_tracker.so
RUST_SOURCES := Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -o -name Cargo.toml -o -name build.rs)

# Where `make install` puts what was built; DESTDIR is in front of it for whoever makes packages.
PREFIX ?= /usr/local
DESTDIR ?=

.PHONY: help setup setup-dev demo test bench soak fuzz lint install uninstall clean system

help:
	@echo 'make setup   what is missing of system packages, .venv and the Rust parts'
	@echo 'make demo    set-up, then a real guest: boot, pause, resume, save, fork'
	@echo 'make test    set-up, linters, Rust tests, Python tests'
	@echo 'make lint    the linters alone'
	@echo 'make bench   the figures, side by side with their peers'
	@echo 'make soak    the long tests'
	@echo 'make fuzz    every fuzz target for FUZZ_S seconds (60)'
	@echo 'make install PREFIX=/usr/local   launcher, systemd units, completions; also as a user, in ~/.local'
	@echo 'make uninstall PREFIX=/usr/local'
	@echo 'make clean   removes what was built, keeps the downloads of pip and cargo'

setup: system $(RUN) $(AGENT) $(LAUNCH) $(PAGER) $(TRACKER) $(PACKAGE)

setup-dev: setup $(DEV)

demo: setup
	$(PYTHON) tools/demo.py

bench: setup
	$(PYTHON) -m benchmarks

lint: setup-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/shellcheck .ci/run tools/*.sh src/diapause/guest/rootfs/etc/{rc,agent,network} src/diapause/guest/rootfs/{ramdisk,agent}/*
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings

test: lint
	cargo test --locked --workspace
	$(PYTHON) -m pytest -m 'not soak' -n auto --dist loadfile

soak: setup-dev
	$(PYTHON) -m pytest -m soak

fuzz: setup-dev
	tools/fuzz.sh

install: setup
	$(PYTHON) tools/install.py '$(PREFIX)' '$(DESTDIR)'

uninstall:
	$(PYTHON) tools/install.py --uninstall '$(PREFIX)' '$(DESTDIR)'

clean:
	rm -rf .venv target src/diapause/native src/diapause/_core*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .cache

system:
	@tools/system.sh

$(RUN): requirements/run.lock requirements/build.lock tools/venv.sh | system
	tools/venv.sh requirements/run.lock requirements/build.lock
	@touch $@

$(DEV): requirements/dev.lock tools/venv.sh $(RUN)
	tools/venv.sh requirements/dev.lock
	@touch $@

$(AGENT): $(RUST_SOURCES) tools/native.sh | system
	tools/native.sh agent

$(LAUNCH): $(RUST_SOURCES) tools/native.sh | system
	tools/native.sh launch

$(PAGER): $(RUST_SOURCES) tools/native.sh | system
	tools/native.sh pager

$(TRACKER): $(RUST_SOURCES) tools/native.sh | system
	tools/native.sh tracker

$(PACKAGE): $(RUST_SOURCES) pyproject.toml tools/native.sh $(RUN)
	tools/native.sh package
	@touch $@
