#!/usr/bin/env bash
# Everything that needs a GPU: bench/gpu.sh [--cpu] [--dry] [kernels] [suite] [tune] [bench]; without names all of them.
#   kernels  the kernels' tests in all dtypes, and small cases of them under compute-sanitizer
#   suite    the other tests
#   tune     the tuner, which goes on where it stopped
#   bench    benchmarks, before and after tuning, pictures, and a profile of the worst ratio
#   --cpu    the same with small sizes and no GPU      --dry  only print the commands
# One run takes at most $LIMIT seconds (560); to give each more, run them one by one: tables and compiled kernels stay
# on the machine. Run from the repository's root. All results of the day go into one results.tar.gz, anew after every
# part, in $OUT, else in bench/results/<date>-<device>. A part that fails, is late or has no time left is noted in the
# summary, and the next ones still run; the exit status is then 1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

cpu=0 dry=0 groups=()
for argument in "$@"; do
    case $argument in
    --cpu) cpu=1 ;;
    --dry) dry=1 ;;
    kernels | suite | tune | bench) groups+=("$argument") ;;
    *)
        echo "usage: bench/gpu.sh [--cpu] [--dry] [kernels] [suite] [tune] [bench]" >&2
        exit 2
        ;;
    esac
done

if ((!${#groups[@]})); then groups=(kernels suite tune bench); fi

python=${PYTHON:-$(command -v python || command -v python3)}
if [[ -z $python ]]; then
    echo "there is no python on the path: name one with PYTHON=" >&2
    exit 2
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 MPLBACKEND=Agg
export PATH="$PATH:/usr/local/cuda/bin"
unset LORAKERNELS_IMPL TRITON_INTERPRET

deadline=$((SECONDS + ${LIMIT:-560}))
names=() states=() times=()

folder() {
    local device=cpu
    if ((!cpu)); then
        device=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null | tr -cs '[:alnum:]\n' '-') || device=gpu
        device=${device%-}
    fi
    echo "$(date +%Y-%m-%d)-${device:-gpu}"
}

if ((dry)); then
    work=work
else
    folder=$(folder)
    work=${TMPDIR:-/tmp}/lorakernels-$(id -u)/$folder
    out=${OUT:-bench/results/$folder}
    mkdir -p "$work" "$out" || exit 1
fi
# The tuner's table stays with the results, and the benchmarks after it, in this run or a later one, read it.
export LORAKERNELS_CACHE="$work/cache"

# A process for each core: compiling takes nearly all of the time of tests on a GPU, on which each holds some memory.
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then
    cores=$(nproc)
    workers=(-n $((cores < 16 ? cores : 16)) --dist worksteal)
fi

wanted() { [[ " ${groups[*]} " == *" $1 "* ]]; }

# After every part: what is there comes back, should the whole run be killed.
pack() { tar -czf "$work.tar.gz" -C "${work%/*}" "${work##*/}" && mv "$work.tar.gz" "$out/results.tar.gz"; }

note() {
    names+=("$1") states+=("$2") times+=("$3")
    printf -- '-- %s: %s, %d s\n' "$1" "$2" "$3"
    pack
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
    rm -f "$work/$name".* # of an earlier run
    printf '\n== %s (at most %d s)\n' "$name" "$limit"
    timeout --signal=INT --kill-after=10 "$limit" "$@" </dev/null >"$work/$name.log" 2>&1
    status=$?
    case $status in
    0) state=ok ;;
    124 | 137) state="time limit" ;;
    *) state="FAILED ($status)" ;;
    esac
    tail -n 4 "$work/$name.log"
    note "$name" "$state" $((SECONDS - start))
}

# Tests and the heuristic's part read no table of the tuner, whose cache an earlier run of the day has filled.
untuned=(env LORAKERNELS_CACHE="$work/no-cache")

tests() {
    part "$1" "$2" "${untuned[@]}" "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" \
        --junitxml "$work/$1.xml" "${@:3}"
}

# One process and small cases: under the sanitizer every access is watched.
sanitized() {
    if command -v compute-sanitizer >/dev/null; then
        part "$1" "$2" "${untuned[@]}" PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool memcheck --error-exitcode 99 "$python" -m pytest -q -p no:cacheprovider "${@:3}"
    else
        skip "$1" "compute-sanitizer is not installed"
    fi
}

skip() { if ((dry)); then echo "# $1: $2"; else note "$1" "skipped: $2" 0; fi; }

lk() { part "$1" "$2" "$python" -m lorakernels "${@:3}"; }

environment() {
    timeout 60 "$python" -m lorakernels doctor --json >"$work/doctor.json"
    if command -v nvidia-smi >/dev/null; then nvidia-smi >"$work/nvidia-smi.txt"; fi
    return 0
}

summary() {
    local i
    printf '\n== summary (%s)\n' "$out/results.tar.gz"
    for i in "${!names[@]}"; do
        printf '%-20s %5d s  %s\n' "${names[i]}" "${times[i]}" "${states[i]}"
    done
    printf '\n'
    if ! wanted bench; then return; fi
    grep -h -e 'of frozen' -e 'no ratio' -e 'beyond torch' -e ' wrong: ' -e ' error: ' \
        "$work/headline.log" "$work/multi.log" 2>/dev/null
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

# The exit status is that of the whole run. A profile by torch stands for one that was refused.
finish() {
    local state status=0
    for state in "${states[@]}"; do
        if [[ $state != ok && $state != skipped:* ]]; then status=1; fi
    done
    if (($1)); then status=1; fi
    if ((!dry)); then
        summary_json >"$work/summary-$run.json"
        summary | tee "$work/summary-$run.txt"
        pack
    fi
    exit "$status"
}

kernels() {
    if ((cpu)); then
        tests tests-linear 150 tests/test_lora_linear.py -k "odd_sizes or rank_17"
        skip sanitizer "it watches a GPU"
        return
    fi
    tests tests-linear 170 tests/test_lora_linear.py
    tests tests-multi 150 tests/test_multi_lora.py
    tests tests-group 100 tests/test_lora_linear_group.py
    tests tests-norm 40 tests/test_weight_norm.py
    sanitized sanitizer-linear 120 tests/test_lora_linear.py -k "odd_sizes and float32"
    sanitized sanitizer-multi 120 tests/test_multi_lora.py -k "pages and float32"
}

suite() {
    if ((cpu)); then
        tests tests-others 150 tests/test_plan.py tests/test_arguments.py
        return
    fi
    tests tests-others 300 tests --ignore tests/test_lora_linear.py --ignore tests/test_multi_lora.py \
        --ignore tests/test_lora_linear_group.py --ignore tests/test_weight_norm.py
}

tune() {
    if ((cpu)); then # In the interpreter nothing is compiled.
        part tune 60 env TRITON_INTERPRET=1 "$python" -m lorakernels tune --shapes 512x256x256x16 --dry-run --arch sm_90
    else
        lk tune 300 tune --set headline --resume --jobs "$(nproc)"
    fi
}

measured() {
    if ((cpu)); then
        part headline-heuristic 60 "${untuned[@]}" "$python" -m lorakernels bench --set small-layer --impl auto,peft \
            --device cpu --rounds 3 --limit 30 --out "$work/headline-heuristic.json"
        lk headline 60 bench --set small-layer --impl auto,peft --device cpu --rounds 3 --limit 30 \
            --out "$work/headline.json"
        lk multi 60 bench --set small-multi --device cpu --rounds 3 --limit 20 --out "$work/multi.json"
        lk others 60 bench --set small-layer --device cpu --rounds 3 --limit 20 --out "$work/others.json"
        return
    fi
    part headline-heuristic 60 "${untuned[@]}" "$python" -m lorakernels bench --set headline \
        --impl auto,split,fused,peft --limit 40 --out "$work/headline-heuristic.json"
    lk headline 110 bench --set headline --limit 85 --out "$work/headline.json"
    # The first of them say most; the time limit leaves out the last.
    lk multi 90 bench --set multi --impl auto,stacks,loop,bmm,peft,vllm --rounds 15 --limit 65 --out "$work/multi.json"
    lk others 90 bench --set dtypes,tokens,ranks --impl auto,split,fused,peft,unsloth,lorafusion \
        --limit 65 --out "$work/others.json"
}

bench() {
    measured
    lk compare 20 bench compare "$work/headline-heuristic.json" "$work/headline.json"
    lk pictures 30 bench plot "$work/headline.json" "$work/others.json" "$work/multi.json" --out "$work/pictures"
    if ((!cpu)) && command -v ncu >/dev/null; then
        part profile 60 ncu --target-processes all --set basic --launch-skip 60 --launch-count 20 \
            "$python" -m lorakernels.bench.profile "$work/headline.json" --plain
        if ((dry)) || [[ ${states[-1]} == ok ]]; then return; fi
        states[-1]="skipped: ncu: ${states[-1]}" # often: no permission to read the counters
    fi
    part profile-torch 45 "$python" -m lorakernels.bench.profile "$work/headline.json"
}

run=$(IFS=-; echo "${groups[*]}")
trap 'finish $?' EXIT
trap 'exit 1' INT TERM HUP
if ((!dry)); then environment; fi
for group in kernels suite tune bench; do
    if wanted "$group"; then "$group"; fi
done
exit 0
