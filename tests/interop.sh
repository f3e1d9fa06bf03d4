#!/usr/bin/env bash
# Tencrypt's agent against other implementations of WireGuard, as real processes in network namespaces.
#
#   interop.sh [--quick] [--only IMPLEMENTATION,...]
#
# A pod with `tencrypt launch` of a directory that names the other pod; the other has a foreign WireGuard with the keys and the
# psk that tests/vectors/kdf.py derives from the project key. For each implementation (Debian's wireguard-go, a pinned Go module
# of it, gotatun; versions in bench/lib/install.py, which installs what is missing into ${XDG_CACHE_HOME:-~/.cache}/tencrypt-bench)
# and for IPv4 and IPv6: with a wrong psk nothing passes; handshake by either side, then ping, TCP and UDP both ways with bytes
# compared; a minute at line rate; ten minutes at one packet per 3 s each way, every one answered, through at least four
# rekeys; and only the tunnel on the wire. tests/interop/main.py says more. Takes 14 minutes; --quick (20 s, 8 s; no rekey) under 2.
#
# Exit status: 0 everything holds, 1 a check failed, 2 usage, or the check itself could not run.
#
# Needs root (or sudo). Environment:
#   TENCRYPT=PROGRAM                                          skips the build
#   WIREGUARD_GO=PROGRAM, WIREGUARD_GO_MODULE=, GOTATUN=      instead of installing it
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
repo=$(dirname "$here")

fail() { printf 'interop.sh: %s\n' "$*" >&2; exit 2; }

as_user() {
  if ((EUID == 0)) && [[ -n ${SUDO_USER:-} && $SUDO_USER != root ]]; then
    sudo -u "$SUDO_USER" -H "$@"
  else
    "$@"
  fi
}

# No bytecode beside the sources, nothing from the user's own site packages.
python=(/usr/bin/python3 -Bs)
[[ -x ${python[0]} ]] || python[0]=python3
main=$here/interop/main.py
for argument; do
  case $argument in -h | --help) exec "${python[@]}" "$main" --help ;; esac
done
as_root=()
if ((EUID != 0)); then
  command -v sudo >/dev/null || fail "needs root, for network namespaces"
  as_root=(sudo)
fi
"$repo/netns-scripts/deps.sh" wireguard-tools || fail "packages are missing"

prepared=$(mktemp)
trap 'rm -f "$prepared"' EXIT
# What is compiled is compiled by the user who started this.
settings=("PATH=$PATH")
for name in XDG_CACHE_HOME WIREGUARD_GO WIREGUARD_GO_MODULE GOTATUN; do
  [[ -z ${!name:-} ]] || settings+=("$name=${!name}")
done
((EUID != 0)) || [[ -z ${SUDO_USER:-} ]] || chown "$SUDO_USER" "$prepared"
as_user env "${settings[@]}" "${python[@]}" "$main" --prepare "$prepared" "$@"

if [[ -z ${TENCRYPT:-} ]]; then
  command -v cc >/dev/null || "$repo/netns-scripts/deps.sh" gcc libc6-dev
  printf 'Building (cargo build --release) ...\n' >&2
  # shellcheck disable=SC2016  # expanded by the inner shell
  script='cd "$0" && PATH=$PATH:$HOME/.cargo/bin && exec cargo build --release --locked --quiet'
  as_user env ${CARGO_TARGET_DIR:+"CARGO_TARGET_DIR=$CARGO_TARGET_DIR"} bash -lc "$script" "$repo" || fail "the build failed"
  TENCRYPT=$(cd "$repo" && readlink -f "${CARGO_TARGET_DIR:-target}/release/tencrypt")
fi
[[ -x $TENCRYPT ]] || fail "no program at '$TENCRYPT'"

# From here on a signal reaches the program that has to clean up; it removes the file, too.
exec "${as_root[@]}" env "TENCRYPT=$(readlink -f "$TENCRYPT")" "${python[@]}" "$main" --prepared "$prepared" "$@"
