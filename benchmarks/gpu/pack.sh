#!/bin/bash
# Packs this checkout for a machine with a GPU and without a network.
#   bash benchmarks/gpu/pack.sh data/ml-1m data/beauty      # prepared datasets to take along
# It makes benchmarks/gpu/packed.tar.xz: the committed files, the datasets, and wheels. Unpack it
# there and run `bash benchmarks/gpu/run.sh` in the folder. PYTHON_VERSION (3.12) is the GPU machine's;
# WHEELS names what it lacks.
set -eu
HERE=$(cd "$(dirname "$0")" && pwd); ROOT=$(cd "$HERE/../.." && pwd)
for data in "$@"; do
  [ -f "$data/dataset.json" ] || { echo "$data is no prepared dataset: it has no dataset.json" >&2; exit 1; }
done
: "${WHEELS:=array_record beartype grain tensorboardX ml_collections portpicker jax-triton>=0.4.1,<0.5}"
TO=$(mktemp -d); trap 'rm -rf "$TO"' EXIT
git -C "$ROOT" archive HEAD | tar -x -C "$TO"
mkdir -p "$TO/benchmarks/gpu/wheels" "$TO/data"
# shellcheck disable=SC2086  # one word for each wheel
python3 -m pip download -q --no-deps --only-binary=:all: --implementation cp \
  --python-version "${PYTHON_VERSION:-3.12}" --platform manylinux_2_28_x86_64 \
  --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$TO/benchmarks/gpu/wheels" $WHEELS
for data in "$@"; do cp -r "$data" "$TO/data/"; done
tar -C "$TO" -cJf "$HERE/packed.tar.xz" .
du -h "$HERE/packed.tar.xz"
