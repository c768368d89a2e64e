#!/usr/bin/env bash
# The table of docs/conversations.md:
#
#   docs/conversations/run.sh MODEL OUT [HISTORY...]
#
# MODEL: a GGUF with budgets; OUT gets a JSON a run (those that are there are left out) and tables.md; HISTORY (default 4096): tokens. The stock cache
# is the same file with tca.enabled false. Environment: PYTHON (default python3), a Python with tca_gguf and openai; THREADS (2);
# LONG (3000): tokens of the long answer; COUNT=1 only counts and compares no answers, which takes a third of the time.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
model=$1 out=$2 here=$(dirname "$0")
shift 2
mkdir -p "$out"
name=$(basename "$model" .gguf)
for history in "${@:-4096}"; do
    for client in server llama; do
        for cache in dense tca; do
            file=$out/$name-$history-$client-$cache.json
            [ -e "$file" ] && continue
            options=()
            [ $cache = dense ] && options+=(--dense)
            [ -n "${COUNT:-}" ] && options+=(--no-compare)
            "${PYTHON:-python3}" "$here/measure.py" run "$model" --client $client --history "$history" --threads "${THREADS:-2}" \
                --long "${LONG:-3000}" "${options[@]}" --save "$file.unfinished"
            mv "$file.unfinished" "$file"
        done
    done
done
"${PYTHON:-python3}" "$here/measure.py" table "$out"/*.json > "$out/tables.md"
cat "$out/tables.md"
