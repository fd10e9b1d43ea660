#!/bin/bash
# Everything that only a GPU can show, most valuable first. It ends itself after SECONDS_LEFT (560).
#   bash benchmarks/gpu/run.sh
# Log and results lie under OUT (benchmarks/gpu/results/DATE) as they come. REHEARSE=1 tries the
# scripts on a CPU at tiny sizes.
HERE=$(cd "$(dirname "$0")" && pwd); ROOT=$(cd "$HERE/../.." && pwd); cd "$ROOT" || exit 1
: "${OUT:=$HERE/results/$(date +%F)}"; export OUT; mkdir -p "$OUT"
LOG=$OUT/log.txt; START=$(date +%s); END=$((START + ${SECONDS_LEFT:-560})); FAILED=0
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$OUT/xla}
PY=python3; [ -x .venv/bin/python ] && PY=.venv/bin/python
say() { echo "[$(($(date +%s) - START)) s] $*" | tee -a "$LOG"; }
step() { # NAME LIMIT COMMAND...: the output goes to the log, its last lines to the screen
  local name=$1 limit=$2 left; shift 2; left=$((END - $(date +%s) - 5))
  [ "$left" -lt "$limit" ] && limit=$left
  [ "$limit" -lt 15 ] && { say "skipped $name: no time left"; FAILED=1; return 1; }
  say "start $name (at most $limit s)"
  timeout -k 5 "$limit" "$@" >>"$LOG" 2>&1; local rc=$?; say "end $name: exit code $rc"
  tail -n 3 "$LOG" | cut -c1-300; [ "$rc" = 0 ] || FAILED=1; return $rc
}

# Wheels that pack.sh has taken along go into a folder of their own.
if ls "$HERE"/wheels/*.whl >/dev/null 2>&1; then
  $PY -m pip install -q --no-index --no-deps --upgrade --target "$OUT/site" "$HERE"/wheels/*.whl >>"$LOG" 2>&1 || say "pip failed, see the log"
  export PYTHONPATH=$OUT/site:$ROOT${PYTHONPATH:+:$PYTHONPATH}
  # jax-triton 0.4 asks Triton 3.6 for a name that it lacks, and then finds nothing of NVIDIA's.
  $PY -c 'from triton.backends.nvidia.driver import TMA_TF32' 2>/dev/null ||
    sed -i 's/^  from triton.backends.nvidia.driver import TMA_TF32 as .*/  _TMA_TF32 = 0/' "$OUT/site/jax_triton/triton_lib.py"
fi
{ nvidia-smi; $PY -V; $PY -m pip list 2>/dev/null | grep -iE '^(jax|triton|torch|flax|optax|numpy)'; } >>"$LOG" 2>&1
MODE=(); [ -n "${REHEARSE:-}" ] && MODE=(--rehearse)
if ! step smoke 75 $PY -m benchmarks.gpu.smoke "${MODE[@]}"; then
  say "no kernel runs here: see $LOG"; [ -n "${REHEARSE:-}" ] || exit 1
fi
if [ -z "${REHEARSE:-}" ]; then
  step tests 130 env JAX_PLATFORMS=cuda,cpu TRITON_INTERPRET=0 $PY -m pytest tests/ssd/test_triton.py tests/ssd/test_block.py -k triton -p no:cacheprovider
fi
step check 150 $PY -m benchmarks.gpu.check_kernels "${MODE[@]}"
step time-op 130 $PY -m benchmarks.gpu.time_op "${MODE[@]}"
step time-step 120 $PY -m benchmarks.gpu.time_step "${MODE[@]}"
step time-mamba 40 $PY -m benchmarks.gpu.time_mamba "${MODE[@]}"
step tune 70 $PY -m benchmarks.gpu.tune_small "${MODE[@]}"
say "results are in $OUT"; exit $FAILED
