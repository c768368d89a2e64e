#!/usr/bin/env bash
# Every figure of docs/quality.md, in parts:
#
#   docs/quality/run.sh MODEL [OUT] [PART...]
#
# MODEL: a GGUF without budgets. OUT (default docs/quality) gets a JSON a part; a part whose JSON is there is skipped, so an
# interrupted run goes on where it stopped; what it had of a part is in PART.unfinished.json. PART: only these, of
#   facts facts-long kl kl-policies tasks policies turns reasoning quantized code records french
# french needs TCA_TEXT, a UTF-8 file of another language than English. Environment: TCA_GGUF (default tca-gguf) says how to
# start it; EVAL_OPTIONS are options for every evaluation, such as "--gpu-layers -1"; LENGTHS (default 4096,8192) of the parts
# that have no other; TASKS (default all five) of the part tasks; BUDGETS (default OUT/budgets), a folder with calibrated-0.39.gguf, -0.25 and -0.15: made if they are missing.
# On an H100 facts took 75 s, facts-long 60 s and the text parts 60 s each, run one or two at a time: more at once are slower.
set -euo pipefail
if [ $# -lt 1 ]; then
    sed -n '2,14s/^# \{0,1\}//p' "$0"
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

at() {  # KEEP POLICY... -> POLICY@KEEP,... ; calibrated is the budgets file at that fraction
    local keep=$1 name list=
    shift
    for name in "$@"; do
        [ "$name" = calibrated ] && list+=$budgets/calibrated-$keep.gguf, || list+=$name@$keep,
    done
    printf '%s' "${list%,}"
}
at_each() {  # POLICY... at 0.39, 0.25 and 0.15
    printf '%s,%s,%s' "$(at 0.39 "$@")" "$(at 0.25 "$@")" "$(at 0.15 "$@")"
}
stock=dense-q8_0,dense-q4_0
baselines=(key-diff streaming-llm random key-norm value-norm observed-attn key-diff+observed)

part() {  # name, arguments of eval
    local name=$1 target=$out/$1.json started=$SECONDS
    shift
    if [ -e "$target" ]; then
        echo "== $name: $target is there"
        return
    fi
    echo "== $name: eval $*"
    # shellcheck disable=SC2086
    if ! $tca eval "$model" "$@" ${EVAL_OPTIONS:-} --save "$out/$name.unfinished.json" > "$out/$name.log"; then
        echo "== $name: not all of it, see $out/$name.log"
        return
    fi
    mv "$out/$name.unfinished.json" "$target"
    echo "== $name: $((SECONDS - started)) s"
}

for name in $parts; do
    case $name in
    facts)      part facts      --suite needle,needle-multikey --lengths "$lengths" --samples 128 --policy "$(at_each calibrated key-diff),$stock" ;;
    facts-long) part facts-long --suite needle,needle-multikey --lengths "${LENGTHS:-16384,32768}" --samples 128 \
                    --policy "$(at 0.39 calibrated key-diff),$(at 0.25 calibrated key-diff),dense-q8_0" ;;
    kl)         part kl         --suite kld --lengths 4096,8192,12288,16384 --policy "$(at_each calibrated key-diff),$stock" ;;
    kl-policies) part kl-policies --suite kld --lengths "$lengths" --policy "$(at_each "${baselines[@]}")" ;;
    policies)   part policies   --suite needle,needle-multikey --lengths "$lengths" --policy "$(at_each "${baselines[@]}")" ;;
    tasks)      part tasks      --suite "${TASKS:-needle-multivalue,needle-multiquery,variables,common-words,frequent-words}" --lengths "$lengths" \
                    --policy "$(at 0.39 calibrated "${baselines[@]}"),$(at 0.25 calibrated "${baselines[@]}"),$stock" ;;
    turns)      part turns      --suite turns --lengths 4096 \
                    --policy "$(at 0.39 calibrated "${baselines[@]}"),$(at 0.25 calibrated "${baselines[@]}"),$stock" ;;
    reasoning)  part reasoning  --suite reasoning --lengths 3072 --samples 2 \
                    --policy "$(at 0.39 calibrated "${baselines[@]}"),$(at 0.25 calibrated "${baselines[@]}"),$stock" ;;
    quantized)  part quantized  --suite needle-multikey,kld --lengths "$lengths" --kv-type q8_0 --policy "$(at_each calibrated),$stock" ;;
    code | records) part "$name" --suite needle-multikey,kld --lengths 8192 --text "$name" --policy "$(at_each calibrated key-diff)" ;;
    french)     part french     --suite needle-multikey,kld --lengths 8192 --text "${TCA_TEXT:?error: part french needs TCA_TEXT, a text file}" \
                    --policy "$(at_each calibrated key-diff)" ;;
    *) echo "error: no part is called $name" >&2; exit 2 ;;
    esac
done
