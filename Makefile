# Two commands on a fresh machine with Python 3.11: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export DAGSTER_HOME ?= $(CURDIR)/dagster_home

.PHONY: demo test soak check docs format ui clean

# Set up once; again when a pin or a dependency changed.
$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Dagster prefers another command than the one that this project is used with, and warns of it.
demo: $(VENV)/.done
	@$(BIN)/python -W 'ignore:Function `job_execute_command` is superseded' -m dagster job execute -m diffsynth_dagster.definitions -j train_demo
	@$(BIN)/python -m diffsynth_dagster.demo.summary

test: $(VENV)/.done
	$(BIN)/python -m pytest

soak: $(VENV)/.done
	$(BIN)/python -m pytest -m soak --timeout 3600

check: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

# Into build/site. mkdocs-material tells each time of the versions to come.
docs: $(VENV)/.done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ui: $(VENV)/.done
	$(BIN)/dagster dev

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
