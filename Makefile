# Everything runs in a virtual environment, .venv. 'make demo' trains a model and generates text.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# PyPI's torch for Linux brings gigabytes of CUDA, so the CPU build is tried first, then PyPI's.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu

# Most modules of torch and transformers are never imported, so they are not compiled beforehand.
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile

.PHONY: demo test setup setup-dev setup-docs tree lint types coverage docs dist wheel versions bases clean

demo: setup
	$(BIN)/mmrec train tiny
	$(BIN)/mmrec generate --prompt "def " --max-tokens 120 --seed 1

test: setup-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev
setup-docs: $(VENV)/.ready-docs

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit("mmrec needs Python 3.11 or newer; this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)+cpu 2>/dev/null \
	  || $(PIP) $(TORCH) --index-url $(CPU_INDEX) 2>/dev/null \
	  || $(PIP) $(TORCH)
	touch $@

$(VENV)/.ready: $(VENV)/.torch pyproject.toml
	$(PIP) -e .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[dev]'
	touch $@ $(VENV)/.ready

$(VENV)/.ready-docs: $(VENV)/.ready-dev
	$(PIP) -e '.[docs]'
	touch $@

# Installed, cli/ and data/ are mmrec.cli and mmrec.data. import-linter and mypy check that layout.
tree:
	rm -rf build/tree && mkdir -p build/tree && cp -r mmrec build/tree/mmrec
	cp -r cli data build/tree/mmrec/

lint: setup-dev tree
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	cd build/tree && ../../$(BIN)/lint-imports ../../pyproject.toml
	if [ -x $(BIN)/zizmor ]; then $(BIN)/zizmor -q --offline .github; fi
	if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint .github/container/Dockerfile; fi

types: setup-dev tree
	cd build/tree && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p mmrec

# Coverage cannot see compiled code, so the kernels' tests run a second time as plain Python. There
# NumPy warns of what the kernels do on purpose: unsigned integers wrap around, and NaN is passed on.
coverage: setup-dev
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	NUMBA_DISABLE_JIT=1 $(BIN)/coverage run -m pytest tests/kernels \
	  -W "ignore:overflow encountered in scalar" -W "ignore:invalid value encountered"
	$(BIN)/coverage combine -q && $(BIN)/coverage report --fail-under=90

# The CLI and configuration pages are generated from the program. Warnings are errors.
docs: setup-docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

# The source distribution, and the wheel built from it; the wheel of the larger pretrained models.
dist: setup-dev
	rm -rf dist
	$(BIN)/python -m build -q
	rm -rf build/mmrec-models && mkdir -p build && cp -r benchmarks/bases/mmrec-models build/
	$(BIN)/python -m build -q --wheel --outdir dist build/mmrec-models
	$(BIN)/python -m twine check --strict dist/*

# The wheel in a clean environment.
wheel: dist
	.ci/wheel dist/mmrec-*.whl

# The oldest and the newest allowed dependencies, each set in an environment of its own.
versions: setup-dev
	$(PIP) uv
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python benchmarks/versions.py

# The pretrained models from their texts on: hours, and gigabytes. What was stopped goes on.
bases: setup
	$(BIN)/python benchmarks/bases/bases.py

clean:
	rm -rf $(VENV) build dist *.egg-info
