# make demo      a real model becomes a mixture of experts, trains, shrinks and answers
# make test      everything CI runs; make test-all adds the slow tests and an older transformers
# make check     style, types and the import order
#
# Each sets up its own environment in .venv first. PYTHON=python3.12 chooses which Python makes it.

.PHONY: demo test test-all check environment

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	done; echo $$python)
RUN := .venv/bin/python -m
JOBS ?= 2
# One thread a test process: threads that wait for each other on busy cores cost more than they bring.
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest -n $(JOBS) --dist worksteal

demo: environment
	$(RUN) moesaic demo

test: check
	$(PYTEST) -m "not slow"

test-all: check
	.venv/bin/python scripts/environment.py --venv .venv-transformers-4 --with "transformers>=4.57,<5"
	MOESAIC_PYTHON_TRANSFORMERS_4=$(CURDIR)/.venv-transformers-4/bin/python $(PYTEST)

check: environment
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy
	$(RUN) pytest -q tests/test_import_order.py

environment:
	@$(PYTHON) scripts/environment.py --extras dev,demo
