#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under ten minutes: tests, sanitizer, tuner, benchmarks, a profile.
# Run from the repository's root with `python` on the path. Results go to $OUT, else to bench/results/<date>-<device>.
# A part that fails or is late is noted in the summary, and the next ones still run; the exit status is then 1.
#   --cpu  the same with small sizes and no GPU      --dry  only print the commands
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

cpu=0 dry=0
for argument in "$@"; do
    case $argument in
    --cpu) cpu=1 ;;
    --dry) dry=1 ;;
    *)
        echo "usage: bench/gpu.sh [--cpu] [--dry]" >&2
        exit 2
        ;;
    esac
done

python=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 MPLBACKEND=Agg
export PATH="$PATH:/usr/local/cuda/bin"
unset LORAKERNELS_IMPL TRITON_INTERPRET

deadline=$((SECONDS + 570))
names=() states=() times=()

results() {
    local device=cpu
    if ((!cpu)); then
        device=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null | tr -cs '[:alnum:]\n' '-') || device=gpu
        device=${device%-}
    fi
    echo "bench/results/$(date +%Y-%m-%d)-${device:-gpu}"
}

if ((dry)); then
    out=${OUT:-results}
else
    out=${OUT:-$(results)}
    mkdir -p "$out" || exit 1
fi
# The tuner's table stays with the results, and the benchmarks after it read it.
export LORAKERNELS_CACHE="$out/cache"

note() {
    names+=("$1") states+=("$2") times+=("$3")
    printf -- '-- %s: %s, %d s\n' "$1" "$2" "$3"
}

# part NAME SECONDS COMMAND...: runs it within its time and the whole run's, keeps its output in NAME.log.
part() {
    local name=$1 limit=$2 start=$SECONDS status state
    shift 2
    if ((dry)); then
        printf '%q ' "$@"
        echo
        return
    fi
    if ((deadline - SECONDS < limit)); then limit=$((deadline - SECONDS)); fi
    if ((limit < 5)); then
        note "$name" "no time left" 0
        return
    fi
    printf '\n== %s (at most %d s)\n' "$name" "$limit"
    timeout --signal=INT --kill-after=10 "$limit" "$@" </dev/null >"$out/$name.log" 2>&1
    status=$?
    case $status in
    0) state=ok ;;
    124 | 137) state="time limit" ;;
    *) state="FAILED ($status)" ;;
    esac
    tail -n 4 "$out/$name.log"
    note "$name" "$state" $((SECONDS - start))
}

# The heuristic's part reads no table of the tuner, whose cache an earlier run of the day has filled.
untuned=(env LORAKERNELS_CACHE="$out/no-cache" "$python" -m lorakernels)

skip() { if ((dry)); then echo "# $1: $2"; else note "$1" "skipped: $2" 0; fi; }

lk() { part "$1" "$2" "$python" -m lorakernels "${@:3}"; }

environment() {
    timeout 60 "$python" -m lorakernels doctor --json >"$out/doctor.json"
    if command -v nvidia-smi >/dev/null; then nvidia-smi >"$out/nvidia-smi.txt"; fi
    return 0
}

summary() {
    local i
    printf '\n== summary (%s)\n' "$out"
    for i in "${!names[@]}"; do
        printf '%-20s %5d s  %s\n' "${names[i]}" "${times[i]}" "${states[i]}"
    done
    printf '\n'
    grep -h -e 'of frozen' -e 'no ratio' -e 'beyond torch' -e ' wrong: ' -e ' error: ' "$out/headline.log" "$out/multi.log" 2>/dev/null
    return 0
}

summary_json() {
    local i comma=""
    printf '['
    for i in "${!names[@]}"; do
        printf '%s\n  {"part": "%s", "seconds": %d, "status": "%s"}' "$comma" "${names[i]}" "${times[i]}" "${states[i]}"
        comma=","
    done
    printf '\n]\n'
}

if ((!dry)); then environment; fi

if ((cpu)); then
    part tests 150 "$python" -m pytest tests/test_lora_linear.py -q -p no:cacheprovider -k "odd_sizes or rank_17"
    skip sanitizer "it watches a GPU"
    part headline-heuristic 60 "${untuned[@]}" bench --set small-layer --impl auto,peft --device cpu --rounds 3 --limit 30 \
        --out "$out/headline-heuristic.json"
    # In the interpreter nothing is compiled.
    part tune 60 env TRITON_INTERPRET=1 "$python" -m lorakernels tune --shapes 512x256x256x16 --dry-run --arch sm_90
    lk headline 60 bench --set small-layer --impl auto,peft --device cpu --rounds 3 --limit 30 --out "$out/headline.json"
    lk others 60 bench --set small-layer --device cpu --rounds 3 --limit 20 --out "$out/others.json"
    lk multi 60 bench --set small-multi --device cpu --rounds 3 --limit 20 --out "$out/multi.json"
else
    # The kernels first: should the time run out, they have been tested.
    part tests-kernels 110 "$python" -m pytest tests/test_lora_linear.py tests/test_multi_lora.py tests/test_weight_norm.py \
        -q -p no:cacheprovider --junitxml "$out/tests-kernels.xml"
    part tests 50 "$python" -m pytest tests --ignore tests/test_lora_linear.py --ignore tests/test_multi_lora.py \
        --ignore tests/test_weight_norm.py -q -p no:cacheprovider --junitxml "$out/tests.xml"
    if command -v compute-sanitizer >/dev/null; then
        part sanitizer 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool memcheck --error-exitcode 99 \
            "$python" -m pytest tests/test_lora_linear.py -q -p no:cacheprovider -k "odd_sizes and float32"
    else
        skip sanitizer "compute-sanitizer is not installed"
    fi
    part headline-heuristic 40 "${untuned[@]}" bench --set headline --impl auto,split,fused,peft --limit 25 \
        --out "$out/headline-heuristic.json"
    lk tune 90 tune --set headline --resume
    lk headline 80 bench --set headline --limit 60 --out "$out/headline.json"
    # The first of them say most; the time limit leaves out the last.
    lk multi 60 bench --set multi --impl auto,stacks,loop,bmm,peft,vllm --rounds 15 --limit 45 --out "$out/multi.json"
    lk others 60 bench --set dtypes,tokens,ranks --impl auto,split,fused,peft,unsloth,lorafusion \
        --limit 40 --out "$out/others.json"
fi

lk compare 20 bench compare "$out/headline-heuristic.json" "$out/headline.json"
if ((!cpu)) && command -v ncu >/dev/null; then
    part profile 45 ncu --target-processes all --set basic --launch-skip 60 --launch-count 20 \
        "$python" -m lorakernels.bench.profile "$out/headline.json" --plain
    if ((!dry)) && [[ ${states[-1]} != ok ]]; then # often: no permission to read the counters
        part profile-torch 30 "$python" -m lorakernels.bench.profile "$out/headline.json"
    fi
else
    part profile 45 "$python" -m lorakernels.bench.profile "$out/headline.json"
fi
lk pictures 30 bench plot "$out/headline.json" "$out/others.json" "$out/multi.json" --out "$out/pictures"

if ((dry)); then exit 0; fi
summary_json >"$out/summary.json"
summary | tee "$out/summary.txt"
for state in "${states[@]}"; do
    if [[ $state == FAILED* ]]; then exit 1; fi
done
exit 0
