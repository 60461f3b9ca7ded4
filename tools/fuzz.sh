#!/bin/bash
# Every fuzz target for FUZZ_S seconds (60), from its committed corpus; the first finding ends it.
# What was found lies in target/fuzz/ then: run the target with that file to see it again, mend it,
# and put the file into the corpus, which the ordinary tests replay.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${FUZZ_S:-60}
host=$(rustc -vV | sed -n 's/^host: //p')
found=$PWD/target/fuzz
mkdir -p "$found"
# What cargo-fuzz passes too, without the sanitizers: those need a nightly compiler.
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions \
-Coverflow-checks -Ccodegen-units=1"

for crate in rust/*/fuzz; do
  # With a target named, the flags are for the program alone and not for build scripts.
  cargo build --quiet --locked --release --manifest-path "$crate/Cargo.toml" \
    --target "$host" --target-dir "$found/build"
  for source in "$crate"/fuzz_targets/*.rs; do
    name=$(basename "$source" .rs)
    grown=$(mktemp -d "$found/$name.XXXXXX")
    echo "fuzz: $crate $name, $seconds s"
    "$found/build/$host/release/$name" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 \
      -artifact_prefix="$found/$name-" -print_final_stats=1 "$grown" "$crate/corpus/$name" \
      2>"$found/$name.log" || { tail -40 "$found/$name.log"; exit 1; }
    grep -E 'stat::number_of_executed_units|cov:' "$found/$name.log" | tail -2
    rm -rf "$grown"
  done
done
