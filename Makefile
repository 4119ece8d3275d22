# Two commands do everything: `make serve` and `make test`. Both install what they need, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
UNINSTALL := $(BIN)/python -m pip uninstall --quiet --quiet --yes
RUNTIME := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)

# onnxruntime and onnxruntime-gpu install the same files: the other one must go before.
OTHER_cpu := onnxruntime-gpu
OTHER_gpu := onnxruntime

.PHONY: serve test lint types contracts unit clean

serve: $(VENV)/.installed-$(RUNTIME)
	$(BIN)/unetpp serve

test: lint types contracts unit

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

contracts: $(VENV)/.installed-dev
	$(BIN)/lint-imports

unit: $(VENV)/.installed-dev
	$(BIN)/python -P -m pytest

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Serving installs no torch.
$(VENV)/.installed-cpu $(VENV)/.installed-gpu: $(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(UNINSTALL) $(OTHER_$*)
	$(PIP) --editable '.[$*,client]'
	@rm -f $(VENV)/.installed-* && touch $@

# torch first and by its exact version, so that no other package's range picks one.
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(UNINSTALL) $(OTHER_$(RUNTIME))
	$(PIP) --editable '.[$(RUNTIME),otel,train,dev]'
	@rm -f $(VENV)/.installed-* && touch $@ $(VENV)/.installed-$(RUNTIME)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
