#!/usr/bin/env bash
# Every figure of docs/quality.md, in parts:
#
#   docs/quality/run.sh MODEL [OUT] [PART...]
#
# MODEL: a GGUF without budgets. OUT (default docs/quality) gets a JSON a part; a part whose JSON is there is skipped, so an
# interrupted run goes on where it stopped. PART: only these, of
#   facts facts-long kl kl-policies tasks policies turns reasoning quantized code records french
# french needs TCA_TEXT, a UTF-8 file of another language than English. Environment: TCA_GGUF (default tca-gguf) says how to
# start it; EVAL_OPTIONS are options for every evaluation, such as "--gpu-layers -1"; LENGTHS (default 4096,8192) of the parts
# that have no other; BUDGETS (default OUT/budgets), a folder with calibrated-0.39.gguf, -0.25 and -0.15: made if they are missing.
# On one H100 a part takes one to five minutes; on two cores of a laptop, hours.
set -euo pipefail
if [ $# -lt 1 ]; then
    sed -n '2,13s/^# \{0,1\}//p' "$0"
    exit 2
fi
model=$1 out=${2:-$(dirname "$0")}
shift; [ $# -gt 0 ] && shift
parts=${*:-facts facts-long kl kl-policies tasks policies turns reasoning quantized code records french}
tca=${TCA_GGUF:-tca-gguf} lengths=${LENGTHS:-4096,8192} budgets=${BUDGETS:-$out/budgets}
mkdir -p "$out" "$budgets"

for keep in 0.39 0.25 0.15; do
    file=$budgets/calibrated-$keep.gguf
    [ -e "$file" ] || $tca embed-budgets "$model" -o "$file" --keep $keep
done

at() {  # "A,B" 0.39 -> "A@0.39,B@0.39"
    sed "s/\(,\|$\)/@$2\1/g" <<< "$1"
}
calibrated() {  # budgets files at the fractions
    local keep
    for keep in "$@"; do printf '%s,' "$budgets/calibrated-$keep.gguf"; done
}
uniform() {  # uniform key-diff budgets at the fractions
    local keep
    for keep in "$@"; do printf 'key-diff@%s,' "$keep"; done
}
stock=dense-q8_0,dense-q4_0
baselines=key-diff,streaming-llm,random,key-norm,value-norm,observed-attn,key-diff+observed

part() {  # name, arguments of eval
    local name=$1 target=$out/$1.json started=$SECONDS
    shift
    if [ -e "$target" ]; then
        echo "== $name: $target is there"
        return
    fi
    echo "== $name: eval $*"
    # shellcheck disable=SC2086
    $tca eval "$model" "$@" ${EVAL_OPTIONS:-} --json > "$target.unfinished"
    mv "$target.unfinished" "$target"
    echo "== $name: $((SECONDS - started)) s"
}

for name in $parts; do
    case $name in
    facts)      part facts      --suite needle,needle-multikey --lengths "$lengths" --policy "$(calibrated 0.39 0.25 0.15)$(uniform 0.39 0.25 0.15)$stock" ;;
    facts-long) part facts-long --suite needle,needle-multikey --lengths 16384,32768 --policy "$(calibrated 0.39 0.25 0.15)$(uniform 0.39 0.25 0.15)$stock" ;;
    kl)         part kl         --suite kld --lengths 4096,8192,12288,16384 --policy "$(calibrated 0.39 0.25 0.15)$(uniform 0.39 0.25 0.15)$stock" ;;
    kl-policies) part kl-policies --suite kld --lengths "$lengths" --policy "$(at $baselines 0.39),$(at $baselines 0.25),$(at $baselines 0.15)" ;;
    policies)   part policies   --suite needle,needle-multikey --lengths "$lengths" --policy "$(at $baselines 0.39),$(at $baselines 0.25),$(at $baselines 0.15)" ;;
    tasks)      part tasks      --suite needle-multivalue,needle-multiquery,variables,common-words,frequent-words --lengths "$lengths" \
                    --policy "$(calibrated 0.39 0.25 0.15)$(at $baselines 0.39),$(at $baselines 0.25),$(at $baselines 0.15),$stock" ;;
    turns)      part turns      --suite turns --lengths 4096 \
                    --policy "$(calibrated 0.39 0.25 0.15)$(at $baselines 0.39),$(at $baselines 0.25),$(at $baselines 0.15),$stock" ;;
    reasoning)  part reasoning  --suite reasoning --lengths 4096 --samples 2 \
                    --policy "$(calibrated 0.39 0.25)$(at $baselines 0.39),$(at $baselines 0.25),$stock" ;;
    quantized)  part quantized  --suite needle-multikey,kld --lengths "$lengths" --kv-type q8_0 --policy "$(calibrated 0.39 0.25 0.15)$stock" ;;
    code | records) part "$name" --suite needle-multikey,kld --lengths 8192 --text "$name" --policy "$(calibrated 0.39 0.25 0.15)$(uniform 0.39 0.25 0.15)" ;;
    french)     part french     --suite needle-multikey,kld --lengths 8192 --text "${TCA_TEXT:?error: part french needs TCA_TEXT, a text file}" \
                    --policy "$(calibrated 0.39 0.25 0.15)$(uniform 0.39 0.25 0.15)" ;;
    *) echo "error: no part is called $name" >&2; exit 2 ;;
    esac
done
