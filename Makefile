# Commands, each from a bare machine (Python >= 3.11) to done:
#   make quickstart   prepares synthetic data, trains TiM4Rec, prints its table
#   make test         lint, types, the fast tests and their coverage
#   make test-all     the same with the slow tests, before a release; it reads the large golden
#                     files too where TIM4REC_GOLDEN names their folder

PYTHON ?= python3
PY := .venv/bin/python

.PHONY: quickstart test test-all test-gpu lint clean

quickstart: .venv/.base
	test -f data/synthetic/dataset.json || $(PY) -m data_prep synthetic --out data/synthetic
	$(PY) train.py --config configs/quickstart.py --workdir runs/quickstart
	$(PY) eval.py --workdir runs/quickstart --split test

test: lint .venv/.tpu .venv/.cuda
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow" --cov

test-all: lint .venv/.tpu .venv/.cuda
	$(PY) -m pytest -n 2 --dist worksteal --cov

# The kernels on an NVIDIA GPU. The environment needs JAX for CUDA.
test-gpu: .venv/.dev
	JAX_PLATFORMS=cuda,cpu TRITON_INTERPRET=0 $(PY) -m pytest tests/ssd/test_triton.py tests/ssd/test_block.py -k triton

lint: .venv/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

clean:
	rm -rf .venv build *.egg-info

# The stamps make a second run start at once; a changed pyproject.toml installs again.
.venv/.base: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/.dev: .venv/.base
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev,kernels]'
	touch $@

# The TPU's compiler, for the tests that compile for it: the version that fits jax, and out of the
# way of all other programs, which would print its warnings. Where there is none, they are skipped.
.venv/.tpu: .venv/.base
	-$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/tpu \
	  "$$($(PY) -c 'from importlib.metadata import requires as r; \
	  print(next(v.split(";")[0] for v in r("jax") if v.startswith("libtpu")))')"
	touch $@

# Likewise the plugin with which programs are lowered for NVIDIA GPUs.
.venv/.cuda: .venv/.dev
	-$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/cuda \
	  jax-cuda12-plugin==$$($(PY) -c 'import jax; print(jax.__version__)')
	touch $@
