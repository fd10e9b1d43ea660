#!/bin/bash
# Everything that only a GPU can show, most valuable first. It ends itself after SECONDS_LEFT (560).
#   bash benchmarks/gpu/run.sh                  # all steps
#   bash benchmarks/gpu/run.sh tune ml1m-paper  # these steps
# Log and results lie under OUT (benchmarks/gpu/results/DATE) as they come. REHEARSE=1 tries the
# steps on a CPU at tiny sizes.
HERE=$(cd "$(dirname "$0")" && pwd); ROOT=$(cd "$HERE/../.." && pwd); cd "$ROOT" || exit 1
: "${OUT:=$HERE/results/$(date +%F)}"; export OUT; mkdir -p "$OUT"
LOG=$OUT/log.txt; START=$(date +%s); WANTED=" $* "; FAILED=0
if [ -n "${REHEARSE:-}" ]; then MODE=(--rehearse); : "${SECONDS_LEFT:=7200}"; else MODE=(); fi
END=$((START + ${SECONDS_LEFT:-560}))
export PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HERE/cache/xla}
PY=python3; [ -x .venv/bin/python ] && PY=.venv/bin/python
SHARED="env XLA_PYTHON_CLIENT_PREALLOCATE=false"  # several programs on one GPU

say() { echo "[$(($(date +%s) - START)) s] $*" | tee -a "$LOG"; }
step() { # NAME LIMIT COMMAND...: the output goes to the log, its last lines to the screen
  local name=$1 limit=$2 left rc; shift 2
  [ "$WANTED" != "  " ] && [ "${WANTED/ $name /}" = "$WANTED" ] && return 0
  left=$((END - $(date +%s) - 15))
  if [ -n "${REHEARSE:-}" ] || [ "$left" -lt "$limit" ]; then limit=$left; fi
  [ "$limit" -lt 15 ] && { say "skipped $name: no time left"; FAILED=1; return 1; }
  say "start $name (at most $limit s)"
  timeout -k 15 "$limit" "$@" >>"$LOG" 2>&1; rc=$?
  tail -n 3 "$LOG" | cut -c1-300; say "end $name: exit code $rc"
  [ "$rc" = 0 ] || FAILED=1; return $rc
}
training() { # NAME LIMIT CONFIG FLAG...: time that runs out is no failure, as a later run goes on
  local name=$1 limit=$2 config=$3 before=$FAILED; shift 3
  step "$name" "$limit" $PY train.py --config "$config" --workdir "$OUT/runs/$name" --config.eval.batch_size=2048 "$@" "${TINY[@]}"
  [ $? = 124 ] && FAILED=$before
  return 0
}

# Wheels that pack.sh has taken along go into a folder of their own.
if ls "$HERE"/wheels/*.whl >/dev/null 2>&1; then
  $PY -m pip install -q --no-index --no-deps --upgrade --target "$HERE/cache/site" "$HERE"/wheels/*.whl >>"$LOG" 2>&1 || say "pip failed, see the log"
  export PYTHONPATH=$HERE/cache/site:$ROOT${PYTHONPATH:+:$PYTHONPATH}
fi
{ nvidia-smi; $PY -V; $PY -m pip list 2>/dev/null | grep -iE '^(jax|triton|torch|flax|optax|numpy)'; } >>"$LOG" 2>&1

if ! step smoke 75 $PY -m benchmarks.gpu.smoke "${MODE[@]}"; then
  say "no kernel runs here: see $LOG"; exit 1
fi
WORKERS=(); $PY -c 'import xdist' 2>/dev/null && WORKERS=(-n 8)
if [ -z "${REHEARSE:-}" ]; then
  step tests 130 $SHARED JAX_PLATFORMS=cuda,cpu TRITON_INTERPRET=0 $PY -m pytest "${WORKERS[@]}" tests/ssd/test_triton.py tests/ssd/test_block.py -k triton -p no:cacheprovider
fi
step check 150 $SHARED $PY -m benchmarks.gpu.check_kernels "${MODE[@]}"
step time-op 130 $PY -m benchmarks.gpu.time_op "${MODE[@]}"
step time-step 120 $PY -m benchmarks.gpu.time_step "${MODE[@]}"
step time-mamba 40 $PY -m benchmarks.gpu.time_mamba "${MODE[@]}"
TINY=(); LONGEST=200
if [ -n "${REHEARSE:-}" ]; then
  [ -e "$OUT/synthetic" ] || $PY -m data_prep synthetic --out "$OUT/synthetic" >>"$LOG" 2>&1
  TINY=(--config.dataset="$OUT/synthetic" --config.train.epochs=1 --config.train.batch_size=64 --config.data.max_length=20)
  LONGEST=20
fi
training ml1m-causal 150 configs/ml1m.py:causal
# Batches of one width: one program to compile instead of five.
training ml1m-paper 170 configs/ml1m.py "--config.data.buckets=($LONGEST,)" --config.train.checkpoint_minutes=0.5
step tune 70 $PY -m benchmarks.gpu.tune_small "${MODE[@]}"
say "results are in $OUT"; exit $FAILED
