# Set-up, the main job and the checks. `make` alone prints the targets.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-torch-defects check docs clean

help: ## Print the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1|\2/' | column -t -s '|'

install: $(INSTALLED) ## Make the environment in .venv

# torch goes first and pinned: what depends on it would otherwise bring a build for accelerators.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "== Environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install ## Train a language model over an emulated slow link, post-local SGD beside DDP
	@echo "== Post-local SGD beside DDP: 4 workers, each behind an emulated link of 25 Mbit/s, into runs/demo"
	@echo "It takes 3 to 4 minutes on 2 cores that do nothing else: DDP first, then post-local SGD"
	$(BIN)/postlocal train --workers 4 --link 25Mbit --compare ddp \
		--strategy 'post_local_sgd(warmup=0, period=4, wire=int4())' \
		--steps 72 --batch-size 16 --lr 2e-3 --eval-every 8 --out runs/demo --overwrite

test: install ## Run the tests
	@echo "== Tests"
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-torch-defects: install ## Show that torch's own classes still have the defects that ours do without
	@echo "== Defects of torch"
	$(BIN)/python -m pytest -m torch_defect tests/test_torch_defects.py

check: install ## Check style and types
	@echo "== Style and types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install ## Build the documentation
	@echo "== Documentation"
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

clean: ## Remove the environment and all that was built
	rm -rf $(VENV) docs/_build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
