# Everything a newcomer needs: `make demo` and `make test`. Needs python3 (3.11 or newer) and venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test bench fuzz style types lint clean

demo: $(VENV)/ready
	$(BIN)/crdtstate demo

test: $(VENV)/ready $(VENV)/oldest
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --dist loadfile
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -m pytest -q tests/test_transports.py tests/test_replica.py

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
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[cli,test]'
	touch $@

# The oldest websockets that pyproject.toml admits; the suite runs on the newest.
$(VENV)/oldest: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-deps --target $@ websockets==15.0.1
