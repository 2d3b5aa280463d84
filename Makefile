# Every target builds its prerequisites, so any of them can be the first on a fresh machine.

.PHONY: train test test-all test-cluster test-torch chaos chaos-cluster matrix check format setup harness slurm clean
PYTHON ?=
# TESTS selects tests by marker; CI runs "not slow". SHARDS processes run them in parallel and need 2 to 3 GiB each;
# auto: one more than cores, if memory allows.
TESTS ?= not slow and not ci
SHARDS ?= auto
PYTEST = $(BIN)/python -m pytest --numprocesses $(SHARDS)
# The tests of clusters: they wait more than they compute. Each shard has a Slurm and hosts of its own.
CLUSTER_TESTS ?= not slow
CLUSTER_SHARDS ?= 2
BIN := .venv/bin

train: setup
	$(BIN)/shoal train recipes/quickstart.yaml

test: harness
	$(PYTEST) --ignore tests/cluster -m "$(TESTS)" $(PYTEST_OPTIONS)

test-all: harness
	$(PYTEST) --ignore tests/cluster
	$(MAKE) test-cluster CLUSTER_TESTS="slow or not slow"

# The tests of several nodes, on a real Slurm and in network namespaces of this machine. Needs root on Linux.
test-cluster: setup slurm
	$(BIN)/python -m pytest tests/cluster --numprocesses $(CLUSTER_SHARDS) --dist loadfile --no-loadscope-reorder -m "$(CLUSTER_TESTS)" $(PYTEST_OPTIONS)

# Test another version of torch: VERSION=2.11.0 in a new environment, or TORCH_ENV=DIR in an existing one.
test-torch:
	@python=$$(for p in $(PYTHON) python3 python3.13 python3.12 python3.11; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done); \
	TORCH_ENV="$(TORCH_ENV)" $${python:?no Python 3.11 or newer was found} scripts/test_torch.py $(VERSION) $(if $(PARTS),--parts $(PARTS))

# Inject 100 random faults into small runs; a seed reproduces each of them.
chaos: setup
	$(BIN)/python scripts/chaos.py

# Inject 100 random cluster faults into small runs on a real Slurm of four nodes; resumes where it stopped.
chaos-cluster: setup slurm
	$(BIN)/python scripts/chaos_cluster.py

matrix: setup
	$(BIN)/python scripts/matrix.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell README.md CONTRIBUTING.md Makefile docs recipes src scripts tests
	$(BIN)/python scripts/check_english.py
	$(BIN)/shellcheck scripts/*.sh scripts/*/*.sh

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: .venv/installed

# lm-evaluation-harness, MLflow's server and Kubernetes' schemas, with their dependencies: needed only by the tests.
harness: .venv/harness

# Slurm's daemons and commands, for the tests of clusters; it starts no service.
slurm:
	@bash scripts/install_slurm.sh

.venv/harness: .venv/installed constraints-eval.txt
	@echo "setup: installing lm-evaluation-harness, MLflow's server and Kubernetes' schemas for the tests (a minute; pip is silent)"
	$(BIN)/pip install -qq --no-deps --requirement constraints-eval.txt
	touch $@

.venv/installed: pyproject.toml constraints.txt scripts/install.sh
	@PYTHON="$(PYTHON)" bash scripts/install.sh

clean:
	rm -rf .venv
