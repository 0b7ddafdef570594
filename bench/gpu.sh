#!/usr/bin/env bash
# Fifteen minutes on a GPU: bench/gpu.sh A [B] [--cpu | --stub] [--only STEPS]
#   A       ceilings, correctness, the sanitizer, first times, a profile      B   the sweep, times tuned, counters, more tests
#   --cpu   the same with small sizes and no GPU      --stub   the same sizes, on a driver that only checks launches
#   --only  some steps, by name with commas
# A part takes at most $LIMIT seconds (330). Results are in $OUT, else in bench/results/<date>, from the first line on: A.jsonl
# (a line a result), A.log (all that was printed), summary.txt. Kernels that were compiled elsewhere are taken from $CACHE, an
# archive of `lorakernels precompile`. The exit status is 1 where a step failed or was late. See docs/benchmarks.md.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

parts=() options=()
while (($#)); do
    case $1 in
    A | B) parts+=("$1") ;;
    --cpu | --stub) options+=("$1") ;;
    --only) options+=("$1" "${2-}") && shift ;;
    *) parts=() && break ;;
    esac
    shift
done
if ((!${#parts[@]})); then
    echo "usage: bench/gpu.sh A [B] [--cpu | --stub] [--only STEPS]" >&2
    exit 2
fi
python=${PYTHON:-$(command -v python || command -v python3)}
if [[ -z $python ]]; then
    echo "there is no python on the path: name one with PYTHON=" >&2
    exit 2
fi

limit=${LIMIT:-330} status=0
out=${OUT:-bench/results/$(date +%Y-%m-%d)}
mkdir -p "$out" || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PATH="$PATH:/usr/local/cuda/bin"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 MPLBACKEND=Agg
unset LORAKERNELS_IMPL TRITON_INTERPRET
for part in "${parts[@]}"; do
    # The steps end by themselves before that. A kernel that hangs does not: then the results so far are summed up.
    timeout --signal=INT --kill-after=5 $((limit - 10)) "$python" bench/gpu.py "$part" --out "$out" --limit $((limit - 20)) \
        "${options[@]}" </dev/null 2>&1 | tee "$out/$part.log" || status=1
done
"$python" bench/gpu.py summary --out "$out" || status=1
exit $status
