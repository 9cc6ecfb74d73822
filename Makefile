# Everything a newcomer needs: `make demo` and `make test`. Needs python3 (3.11 or newer) and venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# What meets websockets; these run on the oldest and the newest of it too.
EDGES := tests/test_transports.py tests/test_replica.py

.PHONY: demo test bench fuzz style types lint clean

demo: $(VENV)/ready
	$(BIN)/crdtstate demo

test: $(VENV)/ready $(VENV)/oldest $(VENV)/newest tests/node/node_modules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --dist loadfile
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -m pytest -q $(EDGES)
	PYTHONPATH=$(VENV)/newest $(BIN)/python -m pytest -q $(EDGES)

bench: $(VENV)/ready
	$(BIN)/python -m benchmarks

# A million hostile sequences; SEQUENCES=n and SEED=n say otherwise. With atheris, five minutes
# guided by coverage after them.
fuzz: $(VENV)/ready
	$(BIN)/python -m fuzz --sequences $(or $(SEQUENCES),1000000) --seed $(or $(SEED),0)
	$(BIN)/python -m fuzz --guided 300

style: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) tests/node/node_modules build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[cli,test]'
	touch $@

# The oldest and the newest websockets that pyproject.toml admits; the suite runs on the newest that
# the SDKs of agents admit too.
$(VENV)/oldest: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-deps --target $@ websockets==15.0.1
$(VENV)/newest: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ websockets

# Clients and servers from npm that tests run against.
tests/node/node_modules: tests/node/package.json tests/node/package-lock.json
	cd tests/node && npm ci --silent --no-audit --no-fund
	touch $@
