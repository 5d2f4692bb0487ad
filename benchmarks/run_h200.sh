#!/usr/bin/env bash
# Everything that matters on one GPU, in under nine minutes: bash benchmarks/run_h200.sh OUT [part ...]
#
# Made for an H200; an H100 of 80 GB does half of the pictures of a step, and every GPU measures its own ceilings.
# Parts: smoke, first-step, gpu-tests, kernels, step, profile, train; all of them by default. The first two take a
# minute: one launch of every op against its definition, then one step of prx-512 at batch 4. Each is bounded in time,
# writes its log and results to OUT, and is skipped where OUT already holds its result: the same command goes on where
# it was cut off. A part that fails does not stop the others; one of which some rows failed or did not finish keeps
# the rest, and fails.
# On their own, most of nine minutes each: steps does every row of the step, all-kernels every row of the kernels, wall
# time too (step and kernels only those that come first). pointwise times what stands between a block's matrix products,
# which is read beside the profile.
# Works from a checkout, offline, with PYTHON=…, else .venv's, else python3: torch >= 2.11, Triton >= 3.6, pytest,
# pytest-benchmark. Without lpips rows with teachers, and the profile, are skipped; without tyro train is. Other
# packages that are missing skip their rows. PRX_TRAIN adds words to train's command, which without a GPU does 20 steps
# only, as benchmarks take tiny sizes then: to see that all works. PRX_COMMIT names the commit where git does not know.
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { echo "usage: bash benchmarks/run_h200.sh OUT [smoke|first-step|gpu-tests|kernels|step|profile|train|steps|all-kernels|pointwise ...]" >&2; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd) || { echo "cannot write to $1" >&2; exit 2; }
shift
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(smoke first-step gpu-tests kernels step profile train)
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=0

# part NAME SECONDS RESULT COMMAND...: run with a limit; RESULT appears in OUT only when the command has succeeded.
part() {
  local name=$1 limit=$2 result=$3 begin=$SECONDS code
  shift 3
  if [ -e "$out/$result" ]; then
    echo "$name: done before ($result)"
    return
  fi
  timeout --signal=INT --kill-after=15 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  echo "$name: $([ $code = 0 ] && echo ok || echo "FAILED with code $code, see $name.log") in $((SECONDS - begin)) s"
  if [ $code = 0 ]; then [ -e "$out/$result" ] || cp "$out/$name.log" "$out/$result"; else failed=1; fi
}

# bench NAME SECONDS REST ARGUMENTS...: benchmarks into NAME.json. Rows whose turn comes in the last REST seconds are
# skipped by name, so that those before them are written; of a part that fails what was measured is kept.
bench() {
  local name=$1 limit=$2 rest=$3
  shift 3
  export PRX_BENCH_SECONDS=$((limit - rest))
  part "$name" "$limit" "$name.json" bash -c '
    out=$1 name=$2 python=$3; shift 3
    "$python" -m pytest "$@" --benchmark-only -q --benchmark-columns=median,iqr -p no:cacheprovider \
      --benchmark-json="$out/$name.part" && mv "$out/$name.part" "$out/$name.json"' \
    bash "$out" "$name" "$python" "$@"
  [ -e "$out/$name.part" ] && "$python" -m benchmarks.summary "$out/$name.part" >/dev/null 2>&1 || return 0
  mv "$out/$name.part" "$out/$name.json"
  echo "$name: what was measured is kept; $(grep -c ^FAILED "$out/$name.log") rows failed, see $name.log"
}

# has MODULE WHAT: whether python has a module; says what is skipped without it.
has() {
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" && return 0
  echo "$2: skipped, $1 is not installed; carry its wheel"
  return 1
}

# What train's command gets beside PRX_TRAIN: on a CPU the whole run would take minutes.
short() {
  "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || echo "--train.steps 20 --evaluation.prompts 8"
}

kernels=(benchmarks/test_{newton_schulz,muon,token_routing,patch_embed,blocks,attention}.py)

for wanted in "${parts[@]}"; do
  case "$wanted" in
    smoke) part smoke 45 smoke.txt "$python" -m pytest -m gpu -q -p no:cacheprovider tests/gpu/test_smoke.py ;;
    first-step)
      has lpips first-step && part first-step 45 first-step.txt "$python" -m benchmarks.first_step
      ;;
    gpu-tests)
      part gpu-tests 70 gpu-tests.txt "$python" -m pytest -m gpu -q -p no:cacheprovider tests \
        --ignore tests/gpu/test_smoke.py
      ;;
    kernels) bench kernels 70 15 "${kernels[@]}" -k "not wall" ;;
    all-kernels) bench all-kernels 530 30 "${kernels[@]}" ;;
    step) # a row of it compiles for up to a minute
      has lpips "step with teachers" || true
      bench step 180 60 benchmarks/test_step.py
      ;;
    steps) bench steps 530 60 benchmarks/test_step.py benchmarks/test_model.py ;;
    pointwise) bench pointwise 180 30 benchmarks/test_pointwise.py ;;
    profile)
      has lpips profile && part profile 65 profile-512.json "$python" -m benchmarks.profile_step --out "$out"
      ;;
    train)
      has tyro train && part train 60 train.txt "$python" train/speedrun.py --output.folder "$out/runs" \
        --output.name shapes $(short) ${PRX_TRAIN:-}
      ;;
    *)
      echo "unknown part '$wanted'; there are smoke, first-step, gpu-tests, kernels, step, profile, train, steps, all-kernels, pointwise" >&2
      exit 2
      ;;
  esac
done

echo
for result in kernels all-kernels step steps pointwise; do
  [ -e "$out/$result.json" ] && "$python" -m benchmarks.summary "$out/$result.json"
done
[ -e "$out/profile-512.json" ] && tail -n 25 "$out/profile.log"
[ -e "$out/train.txt" ] && tail -n 1 "$out/train.txt"
for result in smoke first-step gpu-tests; do
  [ -e "$out/$result.txt" ] && tail -n 1 "$out/$result.txt"
done
exit $failed
