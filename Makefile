# `make demo` and `make test` do everything from a fresh clone, set-up included, in .venv.
PYTHON ?= python3.11
# `make INSTALL="pip install"` does without uv.
INSTALL ?= uv pip install --python .venv/bin/python
BIN := .venv/bin
export YOLO_OFFLINE ?= true
export YOLO_AUTOINSTALL ?= false
# Some containers switch bytecode off. Tests and sweeps start many processes, and each would compile torch and its kin anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-slow test-gpu test-trackers fuzz kills matrix audit trust faults notebooks lint bench bench-coco gpu clean

demo: .venv/ready
	$(BIN)/yolo-gradstab demo

test: .venv/ready
	$(BIN)/pytest -n 2 -m "not slow and not gpu"

test-slow: .venv/ready
	$(BIN)/pytest -n 2 -m "slow and not gpu"

test-gpu: .venv/ready
	$(BIN)/pytest -m gpu

# What real trackers hold after a run. They are put beside .venv, not into it: there the host would log every run.
test-trackers: .venv/ready
	$(BIN)/$(INSTALL) --quiet -c constraints.txt --target .trackers tensorboard mlflow-skinny wandb
	PYTHONPATH=$(CURDIR)/.trackers $(BIN)/pytest tests/test_trackers.py

# Broken COCO files by the hundred thousand; tests/trust/fuzz_coco.py says how they are guided by coverage.
fuzz: .venv/ready
	cd tests && ../$(BIN)/python -m trust.fuzz_coco inputs=100000

# Runs killed at the worst moments, fifty of them: does what is left read, and what goes on equal what would have been?
# A quarter of an hour on two cores; tests/trust/kills.py says what is done. A disk that fills up needs the right to mount one.
kills: .venv/ready
	cd tests && ../$(BIN)/python -m trust.kills kills=50

# The suite with other versions of Ultralytics and torch, each pair in an environment of its own: as long as `make test`
# each. TESTS=tests/test_trainer.py for a part of it.
TESTS ?= tests
matrix: .venv/ready
	cd tests && ../$(BIN)/python -m trust.matrix tests=$(TESTS)

# Known vulnerabilities of the tested versions, as far as advisories can be reached. Beside .venv: it brings much with it.
audit: .venv/ready
	$(PYTHON) -m venv .audit
	if .audit/bin/pip install --quiet --disable-pip-version-check pip-audit; then .audit/bin/python tests/trust/advisories.py; \
	else echo "nothing was looked up: pip-audit could not be installed"; fi

# What was done to it on purpose, and what became of it: the README's table. ONLY=kills,quirks for a part of it.
ONLY ?= kills,inputs,quirks,versions,ranks,endurance
trust: .venv/ready
	cd tests && ../$(BIN)/python -m trust.run only=$(ONLY)

# Faults injected into small real runs: does the first finding name them? About ten minutes on 2 cores.
faults: .venv/ready
	cd tests && ../$(BIN)/python -m faults.run jobs=2

# The notebooks again, from top to bottom on full settings, outputs and all; NOTEBOOKS=FILE for one. Ten minutes on 2 cores.
notebooks: .venv/ready
	$(BIN)/python notebooks/build.py $(NOTEBOOKS)

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The libraries that others log with stand beside .venv, for this alone: with them in it the host would log to one.
bench: .venv/ready
	$(BIN)/$(INSTALL) --quiet --target .peers --no-deps lightning lightning-utilities torchmetrics fsspec wandb
	PYTHONPATH=$(CURDIR)/.peers $(BIN)/yolo-gradstab bench

# Reading a COCO file as large as train2017, against pycocotools.
bench-coco: .venv/ready
	cd tests && ../$(BIN)/python -m coco.bench_reading

# The learning-rate comparison at full size, for a machine with a GPU; see configs/gpu/README.md.
# In .venv; or, with WHEELS=DIR and no network, in PYTHON's own environment with those wheels beside it.
TIME_LIMIT_S ?= 540
GPU_OUT ?= gpu-out
gpu: $(if $(WHEELS),,.venv/ready)
	$(if $(WHEELS),$(PYTHON),$(BIN)/python) configs/gpu/run.py out=$(GPU_OUT) time_limit_s=$(TIME_LIMIT_S) $(if $(WHEELS),wheels=$(WHEELS))

clean:
	rm -rf .venv .trackers .peers .matrix .audit .pytest_cache .mypy_cache .ruff_cache .hypothesis demo gpu-out runs

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(if $(findstring uv,$(INSTALL)),$(BIN)/pip install --quiet uv)
	$(BIN)/$(INSTALL) --quiet -c constraints.txt -e '.[dev]'
	touch $@
