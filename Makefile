# Every target makes its own environment in .venv. The plain commands behind each stand in README.md.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-all check bench sweep wheel

demo: $(INSTALLED)
	$(BIN)/convattn compare digits --variants se,cbam,dual --epochs 8 --out demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m ""

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/python benchmarks/fused.py --markdown benchmarks/results/fused.md

sweep: $(INSTALLED)
	$(BIN)/python benchmarks/sweep.py --markdown benchmarks/results/sweep.md

wheel: $(INSTALLED)
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

$(INSTALLED): pyproject.toml constraints.txt setup.py $(wildcard src/convattn/ops/cpu/*.h src/convattn/ops/cpu/*.cpp)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all,dev]"
	touch $@
