# The two commands of the README (demo, test) and what they are made of.
#
#   PYTHON       interpreter for the environments; default: python3.11, else python3
#   TORCH_INDEX  package index that torch alone comes from; empty: whatever pip is configured with

PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3))
TORCH_INDEX ?=
export PYTHON TORCH_INDEX

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev setup-slurm demo test test-long docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv and .venv-sglang, install everything
	scripts/setup_trainer.sh
	scripts/setup_sglang.sh

setup-dev: setup ## the same, with the test and check tools
	scripts/setup_trainer.sh --dev

setup-slurm: ## install Debian's SLURM, as root, where it is missing; the long tests start one
	scripts/setup_slurm.sh

demo: setup ## set up, then run the arithmetic example from data to evaluation
	.venv/bin/python -m examples.arithmetic.run

test: setup-dev ## set up, then lint, types and all tests but the long ones
	scripts/check.sh

test-long: setup-dev setup-slurm ## set up, then the long tests and the comparison of methods; writes docs/results/
	.venv/bin/python scripts/long_tests.py
	.venv/bin/python -m examples.arithmetic.compare --report docs/results/comparison.md

docs: setup-dev ## regenerate docs/config_reference.yaml
	.venv/bin/python -m sod_mcore.config_help > docs/.config_reference.yaml.tmp
	mv docs/.config_reference.yaml.tmp docs/config_reference.yaml

clean: ## remove both environments and build products
	rm -rf .venv .venv-sglang build *.egg-info
