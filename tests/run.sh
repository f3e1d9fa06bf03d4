#!/usr/bin/env bash
# Every check of the project: format, lints, docs, licences, unit and simulation tests, namespace tests.
#
#   tests/run.sh [FILTER]     only namespace tests whose name contains it
#
# Run it as root, with sudo, or as a user who may sudo: what builds runs as the invoking user, the namespace tests
# as root. What is missing (Debian or Ubuntu packages, cargo-deny) is installed. Without root the namespace tests are
# reported as ignored, and fail where CI=true.
#
# Environment: TENC_LONG=1 for the long forms of the namespace tests; TENC_SEED=SEED[:ROUND], as a test that fails prints
# it, for the rounds of random tampering of that run, from that one on; CARGO_TARGET_DIR as usual.
# The exit status is 0 when nothing failed. The last line is `N passed, N failed, N skipped`.
# shellcheck disable=SC2317  # the steps are called by name
set -uo pipefail
cd "$(dirname "$(readlink -f "$0")")/.." || exit 1

bold='' red='' green='' plain=''
if [[ -t 1 ]]; then bold=$'\e[1m' red=$'\e[31m' green=$'\e[32m' plain=$'\e[0m'; fi

# Who builds, and how to become root.
builder=$(id -un) as_builder=() as_root=()
if ((EUID == 0)) && [[ -n ${SUDO_USER:-} && $SUDO_USER != root ]]; then
  builder=$SUDO_USER
  as_builder=(sudo -u "$builder" -H --)
elif ((EUID != 0)); then
  if command -v sudo >/dev/null; then as_root=(sudo --); fi
fi
builder_home=$(getent passwd "$builder" | cut -d: -f6)
# sudo resets the environment: what the build reads is handed on by name.
build_env=("PATH=$builder_home/.cargo/bin:$PATH")
for name in CI CARGO_TARGET_DIR CARGO_HOME RUSTUP_HOME RUSTUP_TOOLCHAIN TENC_LONG TENC_SEED; do
  if [[ -n ${!name:-} ]]; then build_env+=("$name=${!name}"); fi
done
build() { "${as_builder[@]}" env "${build_env[@]}" "$@"; }

logs=$(mktemp -d) || exit 1
trap 'rm -rf "$logs"' EXIT
passed=0 failed=0 skipped=0 summary=()

# line RESULT NAME DETAIL: one line now and in the summary.
line() {
  local colour=$green text
  if [[ $1 != ok ]]; then colour=$red; fi
  printf -v text '%s%-8s%s %-34s %s' "$colour" "$1" "$plain" "$2" "$3"
  summary+=("$text")
  printf '%s\n' "$text"
}

# check NAME CMD...: a step that is one check; its output shows only when it fails.
check() {
  local name=$1 start=$SECONDS log=$logs/check
  shift
  if "$@" >"$log" 2>&1 </dev/null; then
    passed=$((passed + 1))
    line ok "$name" "$((SECONDS - start)) s"
  else
    failed=$((failed + 1))
    cat "$log"
    line FAILED "$name" "$((SECONDS - start)) s"
    return 1
  fi
}

# tests NAME CMD...: a step whose tests are counted by their closing lines.
tests() {
  local name=$1 start=$SECONDS log=$logs/tests status p f i
  shift
  printf '%s== %s%s\n' "$bold" "$name" "$plain"
  "$@" 2>&1 </dev/null | tee "$log"
  status=${PIPESTATUS[0]}
  read -r p f i < <(awk '/^test result: / { gsub(/[;,]/, ""); for (n = 3; n < NF; n++) {
      if ($(n + 1) == "passed") p += $n; if ($(n + 1) == "failed") f += $n; if ($(n + 1) == "ignored") i += $n } }
    END { print p + 0, f + 0, i + 0 }' "$log")
  # A step that broke before or between its tests has failed once more.
  if ((status != 0 && f == 0)); then f=1; fi
  passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + i))
  if ((f == 0)); then
    line ok "$name" "$p passed, $i skipped, $((SECONDS - start)) s"
  else
    line FAILED "$name" "$p passed, $f failed, $i skipped, $((SECONDS - start)) s"
    return 1
  fi
}

finish() {
  printf '\n%s== summary%s\n' "$bold" "$plain"
  printf '%s\n' "${summary[@]}"
  printf '\n%d passed, %d failed, %d skipped\n' $passed $failed $skipped
  exit $((failed > 0))
}

# The advisory database is a git repository: where it cannot be fetched, the rest is checked and the gap is said.
deny() {
  local log=$logs/advisories
  if build cargo deny check advisories >"$log" 2>&1; then
    build cargo deny check bans licenses sources
  elif grep -q 'failed to fetch advisory database' "$log"; then
    : >"$logs/no-advisories"
    build cargo deny check bans licenses sources
  else
    cat "$log"
    build cargo deny check bans licenses sources
    return 1
  fi
}

install_packages() {
  local more=()
  # Crates with C parts need a compiler.
  command -v cc >/dev/null || more+=(gcc libc6-dev)
  "${as_root[@]}" netns-scripts/deps.sh "${more[@]}"
}

install_deny() {
  build cargo deny --version 2>/dev/null ||
    build env CARGO_PROFILE_DEV_DEBUG=0 cargo install --locked --debug cargo-deny
}

# Everything but the namespace tests and the documentation's examples.
unit_tests() {
  local names=() file
  for file in tests/*.rs; do names+=(--test "$(basename "$file" .rs)"); done
  build cargo test --locked --lib --bins "${names[@]}"
}

# The dev build with faults, kept under a name of its own. Built as a test's companion: that way it shares the unit
# tests' dependencies (a plain build resolves other features and compiles them once more).
fault_build() {
  build cargo test --locked --features fault-injection --test netns --no-run &&
    build mkdir -p "$target/fault" &&
    build cp "$target/debug/tencrypt" "$target/fault/tencrypt"
}

netns_build() {
  build cargo test --locked --test netns --no-run --message-format=json >"$logs/artifacts" &&
    netns=$(sed -n 's/.*"name":"netns".*"executable":"\([^"]*\)".*/\1/p' "$logs/artifacts") &&
    [[ -x $netns ]]
}

netns_tests() {
  local environment=("TENCRYPT=$target/release/tencrypt" "TENCRYPT_FAULT_BIN=$target/fault/tencrypt")
  for name in CI TENC_LONG TENC_SEED; do
    if [[ -n ${!name:-} ]]; then environment+=("$name=${!name}"); fi
  done
  "${as_root[@]}" env "${environment[@]}" "$netns" "$@"
}

if ! build cargo --version >/dev/null; then
  printf 'run.sh: cargo is not there: install a Rust toolchain for %s first\n' "$builder" >&2
  exit 2
fi
target=$(build cargo metadata --locked --no-deps --format-version 1 | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')

check 'packages' install_packages
check 'format' build cargo fmt --check
check 'clippy' build cargo clippy --locked --all-targets -- -D warnings
check 'clippy, fault injection' build cargo clippy --locked --all-targets --features fault-injection -- -D warnings
# With `--examples` (there are none) the features are those of clippy's run, and nothing is checked twice.
check 'documentation' build env RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --lib --examples
if check 'cargo-deny' install_deny; then
  check 'licences, bans, sources, advisories' deny
  if [[ -e $logs/no-advisories ]]; then
    skipped=$((skipped + 1))
    line skipped 'advisories' 'the advisory database could not be fetched: advisories were not checked'
  fi
fi
tests 'unit and simulation tests' unit_tests
tests 'examples of the documentation' build cargo test --locked --doc
if ((failed)); then
  line stopped 'namespace tests' 'not run: a step above failed'
  finish
fi

if check 'release build' build cargo build --locked --release &&
  check 'test build with faults' fault_build && check 'namespace tests: build' netns_build; then
  tests 'namespace tests' netns_tests "$@"
fi
finish
