# README's two commands are `make demo` and `make test`; each makes its own .venv first.
PYTHON ?= python3.11
BIN := .venv/bin
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO = 0
export TOKENIZERS_PARALLELISM = false

SLOW := ray or fault or browser

.PHONY: demo serve test quick slow soak lint bench clean

demo: .venv/installed
	$(BIN)/cxray run configs/demo/all.yaml
	@echo "open runs/demo/report.html, then try the models: make serve"

serve: .venv/installed  # the demo's runs behind HTTP, and a page to try them on
	$(BIN)/cxray serve configs/demo/serve.yaml --ui

test: .venv/installed  # the default tier, which keeps one core busy, beside the others
	$(MAKE) --jobs=2 --keep-going quick slow

quick: .venv/installed  # the default tier
	$(BIN)/python -m pytest -m "not ($(SLOW)) and not soak"

slow: .venv/installed  # what starts Ray, drives a browser, or is broken on purpose
	$(BIN)/python -m pytest -m "($(SLOW)) and not soak"

soak: .venv/installed
	$(BIN)/python -m pytest -m soak

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/installed
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf .venv runs test-output

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@
