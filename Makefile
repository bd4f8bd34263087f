# `make` alone lists the targets. Needs Python 3.11 or newer and make; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
SCENARIO ?=
SEEDS ?= 3
KAFKA ?= 3.9.2
POSTGRES ?=
# What another version of Kafka or Postgres may break: six to eight minutes on two cores.
VERSIONED := $(addprefix tests/integration/,test_pipeline.py test_recreated.py test_transactions.py bridge kafka worker sink postgres jobs replay)
VERSIONED += --ignore tests/integration/worker/test_memory.py

.DEFAULT_GOAL := help
.PHONY: help install demo test versions check lint docs format bench bench-worker bench-sink bench-end-to-end bench-replay bench-memory \
	bench-serve bench-formats bench-fuzz chaos clean

help: ## Show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

demo: .venv/.local ## Run everything once on this machine and compare the table with what was produced; ARGS="--window 0.2"
	$(BIN)/agent-metadata demo $(ARGS)

test: .venv/.dev ## All tests, on a real Kafka and a real Postgres; ARGS="-k store"
	$(BIN)/python -m pytest $(ARGS)

versions: .venv/.dev ## Part of the tests on other versions; KAFKA=4.3.1 POSTGRES=/usr/lib/postgresql/17/bin
	PIPELINE_SERVICES=packages PIPELINE_KAFKA_VERSION=$(KAFKA) PIPELINE_POSTGRES=$(POSTGRES) \
		$(BIN)/python -m pytest $(VERSIONED) $(ARGS)

check: lint docs ## What needs no services: lint, the documentation's site, unit and property tests
	$(BIN)/python -m pytest -q tests/unit tests/property

lint: .venv/.dev ## Lint, format, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/.dev ## Build the documentation's site into site/; a broken link or anchor fails
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: .venv/.dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: bench-worker bench-sink bench-end-to-end bench-serve ## Worker, sink, end to end and serve: about twelve minutes

bench-worker: .venv/.dev ## The worker against stock Faust and a plain loop
	$(BIN)/python -m bench.worker

bench-sink: .venv/.dev ## The sink against the bare UPDATE
	$(BIN)/python -m bench.sink

bench-end-to-end: .venv/.dev ## From the topic to the table, against a plain program
	$(BIN)/python -m bench.end_to_end

bench-serve: .venv/.dev ## 5,000 event streams of one process
	$(BIN)/python -m bench.serve

bench-formats: .venv/.dev ## The worker on Avro, Protobuf, JSON Schema and mapped JSON: about ten minutes
	$(BIN)/python -m bench.formats

bench-fuzz: .venv/.dev ## Feed the decoders input that hypothesis generates, for 5 minutes; ARGS="--seconds 60"
	$(BIN)/python -m tests.property.fuzz $(ARGS)

chaos: .venv/.dev ## All faults, checked against an oracle, 40 minutes; SCENARIO=worker_killed,sink_frozen SEEDS=3
	$(BIN)/python -m tests.chaos "$(SCENARIO)" "$(SEEDS)"

bench-replay: .venv/.dev ## The replay against a plain loop and alongside live load; the refill
	$(BIN)/python -m bench.replay

bench-memory: .venv/.dev ## Peak memory of worker and sink with 2,000,000 pairs in flight and a backlog
	$(BIN)/python -m bench.memory

install: .venv/.dev ## Make .venv with everything for development

clean: ## Remove .venv and caches
	rm -rf .venv site .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.local: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[local]'
	@touch $@

.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch .venv/.local $@
