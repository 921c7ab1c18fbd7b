PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test campaign bench clean

# Install, then pretrain, evaluate and sample a small language model on the built-in corpus (minutes on two cores).
quickstart: .venv/installed
	$(BIN)/python recipes/pretrain.py --config recipes/configs/pretrain/quickstart.yaml

# Lint, type-check and run the default tests: CPU only, no network.
test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy hfkit
	$(BIN)/python -m pytest --numprocesses 2

# The longer tests: trainings, fault injection.
campaign: .venv/installed-test
	$(BIN)/python -m pytest -m slow

# What needs nothing but hfkit; each script of benchmarks/ says how the others run, and all write into results/ there.
bench: .venv/installed-test
	for script in train_speed loss_memory startup; do $(BIN)/python benchmarks/$$script.py || exit 1; done

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamps make pip run again only when what is to be installed has changed.
.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing hfkit into .venv (PyTorch is large: this can take some minutes) …"
	$(INSTALL) --editable .
	@touch $@

.venv/installed-test: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing hfkit and its test tools into .venv (PyTorch is large: this can take some minutes) …"
	$(INSTALL) --editable ".[test]"
	@touch $@ .venv/installed

.venv/bin/python:
	$(PYTHON) -m venv .venv
