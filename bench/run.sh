#!/usr/bin/env bash
# The speed of Tencrypt beside clear traffic and beside what people would use instead, end to end. Wants an idle machine.
#
#   run.sh [--quick] [--peers all|LIST] [--only ROW,...] [--underlay all|LIST] [--rounds N] [--seconds S]
#          [--write] [--save FILE] [--from FILE,...]
#
# `run.sh --help` says what each does, which rows, peers and underlays there are. Builds the program, installs what is
# asked for (packages; peers without one are built into ${XDG_CACHE_HOME:-~/.cache}/tencrypt-bench), makes its own network
# namespaces and removes them. lib/measure.py says what is measured, lib/results.py has the goals.
#
# Exit status: 0 every goal that was measured is met, 1 one is missed, 2 usage, or the benchmark itself failed.
#
# Needs root (or sudo). Environment:
#   TENCRYPT=PROGRAM       skips the build
#   WIREGUARD_GO=PROGRAM, NEBULA=, TINC=, STUNNEL=, BORINGTUN=, GOTATUN=, SHADOWSOCKS_RUST=   instead of installing it
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
repo=$(dirname "$here")

fail() { printf 'run.sh: %s\n' "$*" >&2; exit 2; }

# build: as the user who called sudo, so that target/ and ~/.cargo stay theirs.
build() {
  # shellcheck disable=SC2016  # expanded by the inner shell
  local script='cd "$0" && PATH=$PATH:$HOME/.cargo/bin && exec cargo build --release --locked --quiet'
  as_user env ${CARGO_TARGET_DIR:+"CARGO_TARGET_DIR=$CARGO_TARGET_DIR"} bash -lc "$script" "$repo"
}

as_user() {
  if ((EUID == 0)) && [[ -n ${SUDO_USER:-} && $SUDO_USER != root ]]; then
    sudo -u "$SUDO_USER" -H "$@"
  else
    "$@"
  fi
}

"$repo/netns-scripts/deps.sh"
# No bytecode beside the sources, nothing from the user's own site packages.
python=(/usr/bin/python3 -Bs)
[[ -x ${python[0]} ]] || python[0]=python3
for argument; do
  case $argument in -h | --help) exec "${python[@]}" "$here/lib/main.py" --help ;; esac
done

prepared=$(mktemp)
trap 'rm -f "$prepared"' EXIT
# A peer is compiled by the user who started this; packages need root either way, and deps.sh sees to it.
settings=("PATH=$PATH")
for name in XDG_CACHE_HOME WIREGUARD_GO NEBULA TINC STUNNEL BORINGTUN GOTATUN SHADOWSOCKS_RUST; do
  [[ -z ${!name:-} ]] || settings+=("$name=${!name}")
done
((EUID != 0)) || [[ -z ${SUDO_USER:-} ]] || chown "$SUDO_USER" "$prepared"
needs=$(as_user env "${settings[@]}" "${python[@]}" "$here/lib/main.py" --prepare "$prepared" "$@")
if [[ $needs == report ]]; then
  rm -f "$prepared"
  exec "${python[@]}" "$here/lib/main.py" "$@"
fi

if [[ $needs != tencrypt ]]; then
  TENCRYPT=
elif [[ -z ${TENCRYPT:-} ]]; then
  command -v cc >/dev/null || "$repo/netns-scripts/deps.sh" gcc libc6-dev
  printf 'Building (cargo build --release) ...\n' >&2
  build
  TENCRYPT=$(cd "$repo" && readlink -f "${CARGO_TARGET_DIR:-target}/release/tencrypt")
fi
if [[ $needs == tencrypt ]]; then
  [[ -x $TENCRYPT ]] || fail "no program at '$TENCRYPT'"
  TENCRYPT=$(readlink -f "$TENCRYPT")
fi

as_root=()
if ((EUID != 0)); then
  command -v sudo >/dev/null || fail "needs root, for network namespaces"
  as_root=(sudo)
fi
"${as_root[@]}" env "TENCRYPT=${TENCRYPT:-}" "${python[@]}" "$here/lib/main.py" --prepared "$prepared" "$@"
