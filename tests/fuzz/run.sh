#!/usr/bin/env bash
# Fuzzes every target, or those named, for a while each; needs a nightly toolchain, installs cargo-fuzz.
#
#   tests/fuzz/run.sh [SECONDS [TARGET...]]     600 seconds by default
#
# It starts from the committed corpus and writes what it finds beside the build, in target/corpus. A crash is left in
# tests/fuzz/artifacts: once its cause is mended, it belongs into tests/fuzz/corpus, which `cargo test` replays.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"

seconds=${1:-600}
shift || true
targets=("$@")
if ((${#targets[@]} == 0)); then
  targets=(message_parser session_open handshake control_channel dns_answer inner_packet)
fi

cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz
for target in "${targets[@]}"; do
  found=target/corpus/$target
  mkdir -p "$found"
  # All of `unsafe` is in src/sys, which these targets hardly touch: the address sanitizer would cost more than it finds.
  cargo +nightly fuzz run --fuzz-dir . --sanitizer none "$target" "$found" "corpus/$target" -- \
    -max_total_time="$seconds" -max_len=4096 -timeout=10 -rss_limit_mb=2048
done
