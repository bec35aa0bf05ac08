# `make study` and `make test` do all that they need, from a fresh clone on.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: study smoke demo test bench profile clean help

study: .venv/installed ## the study: corpus, training, report (README has its times)
	$(BIN)/cmdlab study

smoke: .venv/installed ## the same with everything shrunk (2 minutes)
	$(BIN)/cmdlab study --smoke

demo: .venv/tested ## a page where speech finds pictures, by the module that ships (a minute, once installed)
	$(BIN)/cmdlab corpus make study/demo --preset smoke
	$(BIN)/cmdlab index study/demo/images --model spoken-scenes-cmd -o study/demo.index
	@echo 'Open the page below, and type: a red circle; a small blue star; a green square above something'
	$(BIN)/cmdlab serve study/demo.index

test: .venv/tested ## format, lint, types and all tests (twenty-five minutes on two cores)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadgroup

bench: .venv/tested ## the kernels against their peers, on the GPU where there is one
	$(BIN)/cmdlab bench
	$(BIN)/cmdlab report reports/kernels/*.csv -o reports/kernels.html

profile: .venv/installed ## where the study's time goes on this machine (a minute)
	$(BIN)/cmdlab profile

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("cmdlab needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

.venv/tested: .venv/installed requirements-test.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock -r requirements-test.lock
	touch $@

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 8

clean: ## removes what `make study` made; the environment stays
	rm -rf study
