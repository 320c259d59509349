# Two commands do everything: `make demo` and `make test`. Each creates .venv and installs what is pinned in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One compute thread per process: two on two busy cores run many times slower.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test venv lint bench faults scale clean

demo: venv
	$(BIN)/lorafleet demo

test: venv
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations 10

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lorafleet needs Python 3.11 or newer; run: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $(STAMP)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/qlora.py
	$(BIN)/python benchmarks/sweep_vs_ray_tune.py
	$(BIN)/python benchmarks/quality.py

faults: venv
	$(BIN)/python -m pytest -m faults --timeout 3600

scale: venv
	$(BIN)/python -m pytest -m scale --timeout 3600

clean:
	rm -rf $(VENV) .lorafleet
