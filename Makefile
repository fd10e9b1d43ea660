# Commands, each from a bare machine (Python >= 3.11) to done:
#   make quickstart   prepares synthetic data, trains TiM4Rec, prints its table
#   make test         lint, types and the fast tests
#   make test-all     the same with the slow tests and the coverage, before a release; it reads the
#                     large golden files too where TIM4REC_GOLDEN names their folder
#   make docs         the documentation site in docs/_build/html; a warning is an error
#   make test-lowest  the fast tests with the lowest versions that pyproject.toml allows
#
# VENV names another folder for another Python: make test PYTHON=python3.13 VENV=.venv-3.13

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: quickstart test test-all docs test-lowest test-gpu lint clean

quickstart: $(VENV)/.base
	test -f data/synthetic/dataset.json || $(PY) -m data_prep synthetic --out data/synthetic
	$(PY) train.py --config configs/quickstart.py --workdir runs/quickstart
	$(PY) eval.py --workdir runs/quickstart --split test

test: lint $(VENV)/.tpu $(VENV)/.cuda
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow"

test-all: lint docs $(VENV)/.tpu $(VENV)/.cuda $(VENV)/.mlflow
	$(PY) -m pytest -n 2 --dist worksteal --cov

# Everything is read from this folder: the build asks no other machine for anything.
docs: $(VENV)/.docs
	$(PY) -m sphinx --fresh-env --fail-on-warning --keep-going --quiet --builder html docs docs/_build/html

# Newer versions may be typed in another way, so that there is no lint here. The anyio that these
# versions take has a plugin that pytest warns of.
test-lowest: .venv-lowest/lowest.txt
	$(MAKE) VENV=.venv-lowest .venv-lowest/.tpu .venv-lowest/.cuda
	.venv-lowest/bin/python -m pytest -n 2 --dist worksteal -m "not slow" -p no:anyio

# The tools of the tests are the newest ones. uv finds the versions, which pip does not.
.venv-lowest/lowest.txt: pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-lowest/bin/python -m uv pip compile --quiet --no-deps --resolution lowest-direct \
	  --extra serve --extra ann --extra redis --extra tune --extra kernels --output-file $@ $<
	.venv-lowest/bin/python -m uv pip install --quiet --python .venv-lowest/bin/python \
	  --constraint $@ --editable '.[dev,kernels]'
	touch .venv-lowest/.base .venv-lowest/.dev

# The kernels on an NVIDIA GPU. The environment needs JAX for CUDA.
test-gpu: $(VENV)/.dev
	JAX_PLATFORMS=cuda,cpu TRITON_INTERPRET=0 $(PY) -m pytest tests/ssd/test_triton.py tests/ssd/test_block.py tests/ssd/test_ssd.py -k triton

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

clean:
	rm -rf .venv .venv-* build docs/_build *.egg-info

# The stamps make a second run start at once; a changed pyproject.toml installs again.
$(VENV)/.base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) --editable '.[dev,kernels]'
	touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) --editable '.[docs]'
	touch $@

# Large, for a few slow tests.
$(VENV)/.mlflow: $(VENV)/.dev
	$(PIP) --editable '.[mlflow,spark]'
	touch $@

# The TPU's compiler, for the tests that compile for it: the version that fits jax, and out of the
# way of all other programs, which would print its warnings. Where there is none, they are skipped.
$(VENV)/.tpu: $(VENV)/.base
	-$(PIP) --no-deps --upgrade --target $(VENV)/tpu \
	  "$$($(PY) -c 'from importlib.metadata import requires as r; \
	  print(next(v.split(";")[0] for v in r("jax") if v.startswith("libtpu")))')"
	touch $@

# Likewise the plugin with which programs are lowered for NVIDIA GPUs.
$(VENV)/.cuda: $(VENV)/.dev
	-$(PIP) --no-deps --upgrade --target $(VENV)/cuda \
	  jax-cuda12-plugin==$$($(PY) -c 'import jax; print(jax.__version__)')
	touch $@
