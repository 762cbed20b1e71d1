# Everything a user or a CI job starts by name. Each target installs what it needs into .venv first and
# prints every command, so that it can be repeated by hand. `make PYTHON=python3.12` picks a Python.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.NOTPARALLEL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
SYSTEM_PACKAGES := wordnet-base fonts-noto-color-emoji
OUT := runs/demo
# those that measure a GPU where there is one
GPU_BENCHMARKS := $(wildcard tests/bench/kernels.py tests/bench/fused_ops.py tests/bench/internimage.py)

# the shell functions of all recipes: run prints a command and runs it, fail prints a message and ends,
# apt_install does what its name says where this user may, and fails where not
define FUNCTIONS
run() { echo "$$*"; "$$@"; }
fail() { printf '\nerror: ' >&2; printf '%s\n' "$$@" >&2; exit 1; }
supported() { command -v "$$1" >/dev/null && "$$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; }
apt_install() {
  command -v apt-get >/dev/null || return 1
  local apt=(env DEBIAN_FRONTEND=noninteractive apt-get)
  if [ "$$(id -u)" != 0 ]; then sudo -n true 2>/dev/null || return 1; apt=(sudo -n "$${apt[@]}"); fi
  run "$${apt[@]}" install --yes --no-install-recommends "$$@" && return 0
  run "$${apt[@]}" update && run "$${apt[@]}" install --yes --no-install-recommends "$$@"
}
endef

.PHONY: help demo test lint docs gpu clean system-packages

help:
	@echo "make demo    pictograms -> shards -> K-LITE under ZeRO-3 -> evaluation -> $(OUT)/report.html"
	echo "make test    the tests that need no GPU"
	echo "make lint    ruff and mypy"
	echo "make docs    the documentation, into site/"
	echo "make gpu     the tests and benchmarks that need a GPU"
	echo "make clean   remove what the other targets made, but neither .venv nor runs/"

demo: $(VENV)/.with-test system-packages
	@$(FUNCTIONS)
	run $(BIN)/groundwork demo --out $(OUT)

test: $(VENV)/.with-test system-packages
	@$(FUNCTIONS)
	run $(BIN)/pytest $(TESTS)

lint: $(VENV)/.with-dev
	@$(FUNCTIONS)
	run $(BIN)/ruff check .
	run $(BIN)/ruff format --check .
	run $(BIN)/mypy

docs: $(VENV)/.with-docs
	@$(FUNCTIONS)
	run $(BIN)/mkdocs build --strict

gpu: $(VENV)/.with-test
	@$(FUNCTIONS)
	$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || fail \
	  "no GPU: torch.cuda.is_available() is false on this machine, so no GPU test and no benchmark was run"
	run $(BIN)/groundwork kernels build --tune || echo "not every kernel could be built; the tests go on"
	run $(BIN)/pytest -m gpu
	for script in $(GPU_BENCHMARKS); do run $(BIN)/python $$script; done

clean:
	@$(FUNCTIONS)
	run rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	run find data kernels launch pretrain tests -name __pycache__ -prune -exec rm -rf {} +

# Debian's WordNet and font; both are looked for where the package itself looks
system-packages: $(VENV)/.with-test
	@$(FUNCTIONS)
	missing=""
	$(BIN)/python -c 'from groundwork.data.knowledge.wordnet import find_wordnet; find_wordnet()' 2>/dev/null || missing="$$missing wordnet-base"
	$(BIN)/python -c 'from groundwork.data.sources.emoji_font import find_font; find_font()' 2>/dev/null || missing="$$missing fonts-noto-color-emoji"
	if [ -z "$$missing" ]; then exit 0; fi
	apt_install $$missing || fail "missing on this machine, and not installed by itself:$$missing. Run:" \
	  "  sudo apt-get install$$missing" "(names of Debian's packages: WordNet 3.0, and the font Noto Color Emoji)"

$(BIN)/python:
	@$(FUNCTIONS)
	python=""
	for candidate in $(PYTHON) python3 python3.12 python3.11; do
	  if supported $$candidate; then python=$$candidate; break; fi
	done
	if [ -z "$$python" ]; then
	  echo "no Python 3.11 or 3.12 here ($$(python3 --version 2>&1)); asking uv for one"
	  command -v uv >/dev/null || fail "neither Python 3.11 or 3.12 nor uv is here. Run one of:" \
	    "  sudo apt-get install python3.12 python3.12-venv" \
	    "  python3 -m pip install --user uv     (uv fetches a Python by itself)"
	  run uv venv --python 3.12 $(VENV) || fail "uv could not fetch Python 3.12; install Python 3.11 or 3.12 and repeat"
	elif uv --version >/dev/null 2>&1; then
	  run uv venv --python "$$(command -v $$python)" $(VENV)
	elif run $$python -m venv $(VENV); then :
	else
	  rm -rf $(VENV)
	  package=$$($$python -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
	  if apt_install $$package && run $$python -m venv $(VENV); then :
	  elif run $$python -m venv --without-pip $(VENV) && run $$python -m pip install --quiet --target $(VENV)/.uv uv; then
	    run ln -s ../.uv/bin/uv $(BIN)/uv
	  else
	    rm -rf $(VENV)
	    fail "$$python cannot make virtual environments. Run:" "  sudo apt-get install $$package"
	  fi
	fi

# test, dev and docs are the extras of pyproject.toml; a change of it installs again
$(VENV)/.with-%: pyproject.toml | $(BIN)/python
	@$(FUNCTIONS)
	if uv --version >/dev/null 2>&1; then uv=uv
	elif $(BIN)/uv --version >/dev/null 2>&1 || run $(BIN)/python -m pip install --quiet uv; then uv=$(BIN)/uv
	else uv=""; fi
	if [ -n "$$uv" ] && run $$uv pip install --python $(BIN)/python --editable ".[$*]"; then :
	else
	  echo "uv is not here or could not do it; trying pip"
	  $(BIN)/python -m pip --version >/dev/null 2>&1 || run $(BIN)/python -m ensurepip
	  run $(BIN)/python -m pip install --editable ".[$*]"
	fi
	touch $@
