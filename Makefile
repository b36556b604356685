PYTHON ?= python3
# Named in the same command as the project, so that pip takes this build and not the newest one with its CUDA packages.
TORCH ?= torch==2.13.0
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -qq
export PIP_NO_INPUT = 1

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/quamba demo

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-output

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Editable: a changed source file takes effect without another installation.
$(VENV)/.installed: pyproject.toml setup.py | $(BIN)/python
	$(PIP) install "$(TORCH)" -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml setup.py | $(BIN)/python
	$(PIP) install "$(TORCH)" -e ".[test]"
	touch $@ $(VENV)/.installed
