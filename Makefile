# Every target sets up what it needs in a virtual environment in this checkout, once.
#   make test PYTEST_ARGS="-k denoise -x"      some of the tests
#   make test PYTHON=python3.12                another Python, for a new environment
PYTHON      ?= python3
VENV        ?= .venv
PYTEST_ARGS ?=
# Processes that tests are shared out to, each with one thread for PyTorch and up to 4 GB of memory.
WORKERS     ?= 2
DEMO_ARGS   ?=
FUZZ        ?= 1000
SEED        := $(or $(SEED),$(shell date +%s))
# make gpu uses a Python that has PyTorch already, and no virtual environment: GPU machines often have no network.
GPU_PYTHON  ?= $(PYTHON)
OUT         ?=
DRY         ?=
LONG        ?=
PACK        ?=
QUICK       ?=
OPENAI      ?=

BIN      := $(VENV)/bin
METADATA := pyproject.toml setup.py
INTERPRET := TRITON_INTERPRET=1 CMFAST_BACKEND=triton
# pyright is a Node program that its Python package fetches on first use, which needs a network then.
PYRIGHT = @$(BIN)/python -m pyright --version >/dev/null 2>&1 || { echo "pyright: left out, it could not be fetched"; exit 0; }; \
	$(BIN)/python -m pyright --pythonpath $(BIN)/python
PARALLEL = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help demo test coverage lint wheel mutants fuzz bench report docs gpu clean

help:
	@echo "make demo    sample from the bundled model"
	@echo "make test    run the tests             PYTEST_ARGS=... are passed on, to both of its pytest processes"
	@echo "make coverage  the tests again, and the lines that none of them runs"
	@echo "make lint    ruff, mypy and pyright"
	@echo "make wheel   build wheel and sdist, install both in empty environments, use and test them there: minutes"
	@echo "make mutants make faults, each of which must turn a test red: about an hour; MUTANTS_ARGS='--only TEXT' for some"
	@echo "make fuzz    1,000 drawn calls of every operation on every path: FUZZ=n for others, SEED=n for the same again"
	@echo "make bench   benchmarks, 10 minutes at most; QUICK=1 two; OPENAI=checkout measures beside the original; DRY=1 lists"
	@echo "make report  the tables and plots of the results in benchmarks/results"
	@echo "make docs    docs/reference.md, from docstrings, settings and the command line"
	@echo "make gpu     on a GPU machine: GPU tests, benchmarks, compute-sanitizer, into OUT=dir; DRY=1 lists them; LONG=1 more"
	@echo "make clean   remove caches and build products; $(VENV) and what runs wrote stay"

demo: $(VENV)/.core
	$(BIN)/python -m cmfast demo $(DEMO_ARGS)

# Two processes, since Triton cannot compile and interpret in one: everything, then the kernels in the interpreter, and
# the golden numbers through them. PYTEST_ARGS may leave one with nothing to do, which is pytest's exit status 5.
test: $(VENV)/.dev
	$(PARALLEL) $(PYTEST_ARGS) || [ $$? -eq 5 ]
	$(INTERPRET) $(PARALLEL) tests/kernels tests/test_golden.py $(PYTEST_ARGS) || [ $$? -eq 5 ]

# Lines that tests run, in this process and in those that tests start; kernels in the interpreter.
coverage: $(VENV)/.dev
	rm -f .coverage .coverage.*
	$(PARALLEL) --cov --cov-report= $(PYTEST_ARGS)
	$(INTERPRET) $(PARALLEL) tests/kernels tests/test_golden.py --cov --cov-append --cov-report= $(PYTEST_ARGS)
	$(BIN)/python -m coverage json -q -o coverage.json
	$(BIN)/python tests/uncovered.py coverage.json

lint: $(VENV)/.dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(PYRIGHT)

wheel: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_wheel.py -m slow $(PYTEST_ARGS)

mutants: $(VENV)/.dev
	$(BIN)/python tests/mutants.py $(MUTANTS_ARGS)

# More calls than make test draws, and others each time. The seed is printed, and with each failure the call.
fuzz: $(VENV)/.dev
	@echo "make fuzz FUZZ=$(FUZZ) SEED=$(SEED)"
	CMFAST_FUZZ_EXAMPLES=$(FUZZ) $(PARALLEL) tests/fuzz --hypothesis-seed=$(SEED) $(PYTEST_ARGS)
	CMFAST_FUZZ_EXAMPLES=$(FUZZ) $(INTERPRET) $(PARALLEL) tests/kernels/test_fuzz.py --hypothesis-seed=$(SEED) $(PYTEST_ARGS)

bench: $(VENV)/.dev
	$(BIN)/python -m cmfast bench $(if $(QUICK),--quick) $(if $(OPENAI),--openai $(OPENAI)) $(if $(OUT),--out $(OUT)) \
		$(if $(DRY),--list) $(BENCH_ARGS)

report: $(VENV)/.dev
	$(BIN)/python -m cmfast.benchmarks.report

docs: $(VENV)/.dev
	$(BIN)/python docs/make_reference.py

gpu:
	$(GPU_PYTHON) -m cmfast.benchmarks.gpu --out $(if $(OUT),$(OUT),out/gpu) $(if $(OPENAI),--openai $(OPENAI)) \
		$(if $(DRY),--dry) $(if $(LONG),--long) $(if $(PACK),--pack)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -rf .coverage .coverage.* coverage.xml coverage.json htmlcov
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# The stamps say what is installed, and are newer than the files that declare it.
$(VENV)/.core: $(METADATA) | $(BIN)/pip
	$(BIN)/python -m pip install --editable .
	@touch $@

$(VENV)/.dev: $(METADATA) | $(BIN)/pip
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $(VENV)/.core $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: '$(PYTHON)' must be Python 3.10 or newer and have venv." >&2; \
		echo "       Debian, Ubuntu: apt-get install python3-venv. Another Python: make ... PYTHON=python3.12" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
