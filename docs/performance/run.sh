#!/usr/bin/env bash
# Every figure of docs/performance.md, in parts of under 20 minutes on two cores:
#
#   docs/performance/run.sh MODEL SMALL_MODEL [OUT] [PART...]
#
# MODEL: a GGUF of Qwen2.5-Coder-0.5B-Instruct with budgets at 0.39 (embed-budgets --keep 0.39), SMALL_MODEL: SmolLM2-135M-Instruct, likewise.
# OUT (default docs/performance) gets a JSON a part, the plot and the tables. A part whose JSON is there is skipped, so an
# interrupted run goes on where it stopped; remove a JSON to measure its part again. PART: only these, of
#   short 16k budgets 32k-off 32k-on smollm2 dim128 default default-32k
# The last two need DEFAULT_MODEL: the first model with the budgets of a plain embed-budgets (0.25). Run nothing else on the machine
# meanwhile. TCA_GGUF (default tca-gguf) and PYTHON (default python3) say how to start them.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,13s/^# \{0,1\}//p' "$0"
    exit 2
fi
model=$1 small=$2 out=${3:-$(dirname "$0")}
shift 2; [ $# -gt 0 ] && shift
parts=${*:-short 16k budgets 32k-off 32k-on smollm2 dim128${DEFAULT_MODEL:+ default default-32k}}
here=$(cd "$(dirname "$0")/../.." && pwd)
tca=${TCA_GGUF:-tca-gguf} python=${PYTHON:-python3}
mkdir -p "$out"

part() {  # name, model, arguments of bench
    local name=$1 target=$out/$1.json started=$SECONDS
    shift
    if [ -e "$target" ]; then
        echo "== $name: $target is there"
        return
    fi
    echo "== $name: bench $*"
    $tca bench "$@" --save "$target.unfinished"
    mv "$target.unfinished" "$target"
    echo "== $name: $((SECONDS - started)) s"
}

for name in $parts; do
    case $name in
    short)    part short "$model" --depths 512,2048 --tests whole,decode --passes 5 --repeat 5 ;;
    16k)      part 16k "$model" --depths 4K,8K,16K --tests prefill,decode,whole --kv-type f16,q8_0 --dense-kv f16 ;;
    budgets)  part budgets "$model" --depths 16K --tests prefill,decode,whole --budgets dense,0.25 --repeat 2 ;;
    default)  part default "${DEFAULT_MODEL:?error: part default needs DEFAULT_MODEL}" --depths 16K --tests prefill,decode,whole --kv-type f16,q8_0 --dense-kv f16 ;;
    default-32k) part default-32k "${DEFAULT_MODEL:?error: part default-32k needs DEFAULT_MODEL}" --depths 32K --tests decode,whole --fa off ;;
    32k-off)  part 32k-off "$model" --depths 16K,32K --tests decode,whole --fa off --budgets file,0.25 ;;
    32k-on)   part 32k-on "$model" --depths 16K,32K --tests decode,whole --fa on ;;
    smollm2)  part smollm2 "$small" --depths 512,2K,7680 --tests prefill,decode,whole --budgets file,0.25 ;;
    dim128)
        random=$out/random-128
        [ -e "$random/keep-0.39.gguf" ] || "$python" "$here/native/scripts/random-gguf.py" "$random" --shape small --only keep-0.39
        part dim128 "$random/keep-0.39.gguf" --depths 512,2K,8K --tests prefill,decode,whole --budgets file,0.25
        rm -rf "$random" ;;
    *) echo "error: no part is called $name" >&2; exit 2 ;;
    esac
done

results=()
for name in short 16k budgets 32k-off 32k-on smollm2 dim128 default default-32k; do
    [ -e "$out/$name.json" ] && results+=("$out/$name.json")
done
"$python" -m tca_gguf.bench.tables "${results[@]}" > "$out/tables.md"
qwen=()
for name in 16k 32k-off 32k-on; do
    [ -e "$out/$name.json" ] && qwen+=("$out/$name.json")
done
[ ${#qwen[@]} -eq 0 ] || "$python" -m tca_gguf.bench.plot "${qwen[@]}" -o "$out/speed.png"
echo "== tables: $out/tables.md"
