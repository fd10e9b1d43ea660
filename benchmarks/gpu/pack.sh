#!/bin/bash
# Packs this checkout for a machine with a GPU and without a network.
#   bash benchmarks/gpu/pack.sh data/ml-1m data/beauty      # prepared datasets to take along
# It fills benchmarks/gpu/wheels with what the machine lacks, and makes benchmarks/gpu/packed.tar.xz:
# the committed files, the wheels and the datasets. Unpack it there and run
# `bash benchmarks/gpu/run.sh` in the folder.
#   PYTHON_VERSION   the GPU machine's Python (3.12)
#   WHEELS           what it lacks. It has JAX 0.11 for CUDA, flax, optax, orbax-checkpoint and pytest.
#   MAMBA            folder of an unpacked source distribution of mamba-ssm, to compare with
set -eu
HERE=$(cd "$(dirname "$0")" && pwd); ROOT=$(cd "$HERE/../.." && pwd)
for data in "$@"; do
  [ -f "$data/dataset.json" ] || { echo "$data is no prepared dataset: it has no dataset.json" >&2; exit 1; }
done
: "${WHEELS:=annotated-types array_record beartype grain hypothesis jax-triton>=0.4.1,<0.5 jaxtyping ml_collections portpicker pyarrow pydantic sortedcontainers tensorboardX typing-inspection wadler-lindig}"
fetch() { # REQUIREMENT...: wheels for the machine
  python3 -m pip download -q --no-deps --only-binary=:all: --implementation cp \
    --python-version "${PYTHON_VERSION:-3.12}" --platform manylinux_2_28_x86_64 \
    --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 -d "$HERE/wheels" "$@"
}
rm -rf "$HERE/wheels" "$HERE/mamba"
# shellcheck disable=SC2086  # one word for each wheel
fetch $WHEELS
# The one version of its core that this pydantic works with.
if ls "$HERE"/wheels/pydantic-*.whl >/dev/null 2>&1; then
  fetch "$(unzip -p "$HERE"/wheels/pydantic-*.whl '*/METADATA' | sed -n 's/^Requires-Dist: \(pydantic-core==[0-9.]*\).*/\1/p')"
fi
TO=$(mktemp -d); trap 'rm -rf "$TO"' EXIT
git -C "$ROOT" archive HEAD | tar -x -C "$TO"
if [ -n "${MAMBA:-}" ]; then
  # Its own __init__ imports compiled kernels, which the Triton pipeline does not need.
  mkdir -p "$HERE/mamba" && cp -r "$MAMBA/mamba_ssm" "$HERE/mamba/" && : >"$HERE/mamba/mamba_ssm/__init__.py"
  cp -r "$HERE/mamba" "$TO/benchmarks/gpu/"
fi
mkdir -p "$TO/data"; cp -r "$HERE/wheels" "$TO/benchmarks/gpu/"
for data in "$@"; do cp -r "$data" "$TO/data/"; done
tar -C "$TO" -cJf "$HERE/packed.tar.xz" .
du -h "$HERE/packed.tar.xz"; du -sh "$HERE/wheels" "$@"
