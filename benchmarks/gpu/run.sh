#!/bin/bash
# Everything that only a GPU can show, most valuable first. It ends itself after SECONDS_LEFT (540).
#   bash benchmarks/gpu/run.sh                  # all steps
#   bash benchmarks/gpu/run.sh tune ml1m-paper  # these steps
# A step that reaches its limit has failed, but what it has written stays. The limits of the steps up
# to time-step add up to 425 s.
# Log and results lie under OUT (benchmarks/gpu/results/DATE) as they come, and at the end the runs of
# the trainings, runs.tar.gz. The next start unpacks it from OUT or from this folder and goes on.
# --rehearse as first argument tries the steps on a CPU at tiny sizes.
HERE=$(cd "$(dirname "$0")" && pwd); ROOT=$(cd "$HERE/../.." && pwd); cd "$ROOT" || exit 1
MODE=(); LIMIT=540
if [ "${1:-}" = --rehearse ]; then MODE=(--rehearse); LIMIT=7200; shift; fi
: "${OUT:=$HERE/results/$(date +%F)}"; export OUT; mkdir -p "$OUT"
RUNS=$HERE/cache/runs; mkdir -p "$RUNS"
[ -n "${MODE[*]}" ] && RUNS=$OUT/rehearsal && mkdir -p "$RUNS"
LOG=$OUT/log.txt; START=$(date +%s); END=$((START + ${SECONDS_LEFT:-$LIMIT})); WANTED=" $* "; FAILED=0
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HERE/cache/xla}
PY=python3; [ -x .venv/bin/python ] && PY=.venv/bin/python
SHARED="env XLA_PYTHON_CLIENT_PREALLOCATE=false"  # several programs on one GPU

STEPS=$(sed -nE 's/^ *(step|training) ([a-z0-9-]+) .*/\2/p' "$HERE/run.sh" | tr '\n' ' ')
for name in "$@"; do
  [[ " $STEPS" = *" $name "* ]] || { echo "$name is no step; there are $STEPS" >&2; exit 2; }
done
say() { echo "[$(($(date +%s) - START)) s] $*" | tee -a "$LOG"; }
wanted() { [ "$WANTED" = "  " ] || [ "${WANTED/ $1 /}" != "$WANTED" ]; }
step() { # NAME LIMIT COMMAND...: the output goes to the log, its last lines to the screen
  local name=$1 limit=$2 left rc text; shift 2
  wanted "$name" || return 0
  left=$((END - $(date +%s) - 20))  # what is left after it packs the runs
  if [ -n "${MODE[*]}" ] || [ "$left" -lt "$limit" ]; then limit=$left; fi
  [ "$limit" -lt 15 ] && { say "skipped $name: no time left"; FAILED=1; return 1; }
  say "start $name (at most $limit s)"
  text=$OUT/.$name.txt  # steps may run side by side
  timeout -k 10 "$limit" "$@" >"$text" 2>&1; rc=$?
  { echo "--- $name"; cat "$text"; } >>"$LOG"
  tail -n 3 "$text" | cut -c1-300; rm "$text"; say "end $name: exit code $rc"
  [ "$rc" = 0 ] || FAILED=1; return $rc
}
training() { # NAME LIMIT CONFIG FLAG...: time that runs out is no failure, as a later run goes on
  local name=$1 limit=$2 config=$3 before=$FAILED; shift 3
  wanted "$name" || return 0
  step "$name" "$limit" $PY train.py --config "$config" --workdir "$RUNS/$name" --config.eval.batch_size=2048 "$@" "${TINY[@]}"
  case $? in 124 | 137) FAILED=$before ;; esac
  keep_runs
}
keep_runs() { tar -C "$RUNS" -czf "$OUT/runs.tar.gz" --exclude=tensorboard . 2>>"$LOG"; }

# Wheels that pack.sh has taken along go into a folder of their own, mamba_ssm's modules likewise.
if ls "$HERE"/wheels/*.whl >/dev/null 2>&1; then
  $PY -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$HERE/cache/site" "$HERE"/wheels/*.whl >>"$LOG" 2>&1 || say "pip failed, see the log"
  export PYTHONPATH=$HERE/cache/site:$ROOT${PYTHONPATH:+:$PYTHONPATH}
fi
MAMBA="env PYTHONPATH=$HERE/mamba:${PYTHONPATH:-$ROOT}"
if [ -z "${MODE[*]}" ] && [ -z "$(ls -A "$RUNS")" ]; then
  for kept in "$OUT/runs.tar.gz" "$HERE/runs.tar.gz"; do
    [ -e "$kept" ] && { tar -C "$RUNS" -xzf "$kept" && say "goes on with the trainings in $kept"; break; }
  done
fi
{ nvidia-smi; $PY -V; nproc; $PY -m pip list 2>/dev/null | grep -iE '^(jax|triton|torch|flax|optax|orbax|grain|numpy)'; } >>"$LOG" 2>&1

step smoke 75 $SHARED $PY -m benchmarks.gpu.smoke "${MODE[@]}"
[ $? = 3 ] && { say "there is no GPU: see $LOG"; exit 1; }
step time-causal 70 $PY -m benchmarks.gpu.time_causal "${MODE[@]}"
# Side by side, as nothing of it is timed: compiling takes the host's cores, and the GPU has room.
WORKERS=(); $PY -c 'import xdist' 2>/dev/null && WORKERS=(-n 8)
if [ -z "${MODE[*]}" ]; then
  step tests 110 $SHARED JAX_PLATFORMS=cuda,cpu TRITON_INTERPRET=0 $PY -m pytest "${WORKERS[@]}" -v -W default tests/ssd/test_triton.py tests/ssd/test_block.py tests/ssd/test_ssd.py -k triton -p no:cacheprovider &
  TESTS=$!
  wanted time-mamba && $MAMBA timeout 110 $PY -m benchmarks.gpu.time_mamba --warm >/dev/null 2>&1 &
fi
step check 110 $SHARED XLA_PYTHON_CLIENT_MEM_FRACTION=.9 $PY -m benchmarks.gpu.check_kernels "${MODE[@]}"
[ -z "${TESTS:-}" ] || wait "$TESTS" || FAILED=1
wait
step time-op 85 $PY -m benchmarks.gpu.time_op "${MODE[@]}"
step time-step 85 $PY -m benchmarks.gpu.time_step "${MODE[@]}"
TINY=(); LONGEST=200
if [ -n "${MODE[*]}" ]; then
  [ -e "$OUT/synthetic" ] || $PY -m data_prep synthetic --out "$OUT/synthetic" >>"$LOG" 2>&1
  TINY=(--config.dataset="$OUT/synthetic" --config.train.epochs=1 --config.train.batch_size=64 --config.data.max_length=20)
  LONGEST=20
fi
training ml1m-causal 150 configs/ml1m.py:causal
step time-mamba 40 $MAMBA $PY -m benchmarks.gpu.time_mamba "${MODE[@]}"
# Batches of one width: one program to compile instead of five.
training ml1m-paper 170 configs/ml1m.py "--config.data.buckets=($LONGEST,)" --config.train.checkpoint_minutes=0.5
step tune 70 $PY -m benchmarks.gpu.tune_small "${MODE[@]}"
say "results are in $OUT"; exit $FAILED
