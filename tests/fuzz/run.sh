#!/bin/sh
# Fuzzes the kernel with libFuzzer: sh tests/fuzz/run.sh [seconds] [jobs]; every other job the form without vectors.
# Needs clang with its runtime, and a Python that has everystep (PYTHON; else that of .venv). Ends with 1 on a finding,
# which stays in the folder that is named then.
set -eu
cd "$(dirname "$0")/../.."
seconds=${1:-60} jobs=${2:-1}
kernel=${KERNEL:-src/everystep/codecs/kernel}
folder=$(mktemp -d)
for form in WIDE_IF_THERE PLAIN; do
    ${CC:-clang} -std=c11 -O2 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -I"$kernel" -D"$form" \
        tests/fuzz/decoders.c "$kernel"/codes.c "$kernel"/packed.c "$kernel"/sparse.c "$kernel"/planes.c -lm \
        -o "$folder/decoders-$form"
done
"${PYTHON:-.venv/bin/python}" tests/fuzz/seeds.py "$folder/seeds"
mkdir "$folder/corpus"
pids="" job=0
while [ "$job" -lt "$jobs" ]; do
    job=$((job + 1))
    form=WIDE_IF_THERE
    [ $((job % 2)) = 1 ] || form=PLAIN
    "$folder/decoders-$form" -max_total_time="$seconds" -timeout=600 -rss_limit_mb=2048 -max_len=65536 -seed="$job" \
        -print_final_stats=1 -artifact_prefix="$folder/found-" "$folder/corpus" "$folder/seeds" 2>"$folder/log-$job" &
    pids="$pids $!"
done
failed=0
for pid in $pids; do wait "$pid" || failed=1; done
grep -hE "ERROR|not so|runtime error|cov: .*(DONE|pulse)|stat::" "$folder"/log-* | tail -n 20
if [ "$failed" = 1 ]; then
    echo "a finding: $folder"
    exit 1
fi
rm -rf "$folder"
echo "nothing found in $seconds seconds by $jobs jobs"
