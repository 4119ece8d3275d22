# Two commands do everything: `make serve` and `make test`. Both install what they need, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Errors only, because pip warns about every folder of its configuration that does not exist, several lines per package.
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
INSTALL := $(PIP) install --constraint constraints.txt --build-constraint constraints.txt
UNINSTALL := $(PIP) uninstall --yes
RUNTIME := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)

# onnxruntime and onnxruntime-gpu install the same files: the other one must go before.
OTHER_cpu := onnxruntime-gpu
OTHER_gpu := onnxruntime

# What the prose check reads; see tools/prose.toml.
PROSE := bench/*.py bench/peers tests/bench tests/docker tests/tools tools

.PHONY: serve test lint types contracts prose unit clean

serve: $(VENV)/.installed-$(RUNTIME)
	@$(BIN)/unetpp serve

test: lint types contracts prose unit

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

contracts: $(VENV)/.installed-dev
	$(BIN)/lint-imports

prose: $(VENV)/.installed-dev
	$(BIN)/python tools/prose.py $(PROSE)

unit: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest --numprocesses logical --dist worksteal

$(BIN)/python:
	@echo "Installing into $(VENV), once; this takes some minutes."
	@$(PYTHON) -m venv $(VENV)

# pip itself first, because older ones know no --build-constraint. Serving installs no torch.
$(VENV)/.installed-cpu $(VENV)/.installed-gpu: $(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@$(PIP) install --constraint constraints.txt pip
	@$(UNINSTALL) $(OTHER_$*)
	@$(INSTALL) --editable '.[$*,client]'
	@rm -f $(VENV)/.installed-* && touch $@

# torch first and by its exact version, so that no other package's range picks one.
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@$(PIP) install --constraint constraints.txt pip
	@$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	@$(UNINSTALL) $(OTHER_$(RUNTIME))
	@$(INSTALL) --editable '.[$(RUNTIME),otel,train,dev]'
	@rm -f $(VENV)/.installed-* && touch $@ $(VENV)/.installed-$(RUNTIME)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
