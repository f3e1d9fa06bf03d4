#!/usr/bin/env bash
# Installs what the lab, the demo and the tests need from Debian or Ubuntu packages, if it is missing.
#
#   deps.sh [PACKAGE...]     further packages by name
#
# Starts no service. Says nothing and touches nothing when everything is there.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

# A program and the package that has it.
PROGRAMS='
ip          iproute2
nft         nftables
tcpdump     tcpdump
dig         bind9-dnsutils
iperf3      iperf3
dnsmasq     dnsmasq-base
curl        curl
python3     python3
jq          jq
ping        iputils-ping
ps          procps
strace      strace
nsenter     util-linux
'

missing=()
while read -r program package; do
  [[ -z $program ]] || command -v "$program" >/dev/null || missing+=("$package")
done <<<"$PROGRAMS"
# A minimal Python lacks the modules of the lab's web server.
[[ " ${missing[*]} " == *' python3 '* ]] || python3 -I -c 'import http.server' 2>/dev/null || missing+=(python3)
for package; do
  [[ $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null) == 'install ok installed' ]] || missing+=("$package")
done
((${#missing[@]})) || exit 0

if ! command -v apt-get >/dev/null; then
  printf 'deps: this is no Debian or Ubuntu; please install: %s\n' "${missing[*]}" >&2
  exit 3
fi
as_root=()
if ((EUID != 0)); then
  command -v sudo >/dev/null || { printf 'deps: needs root to install: %s\n' "${missing[*]}" >&2; exit 3; }
  as_root=(sudo)
fi

printf 'deps: installing %s\n' "${missing[*]}" >&2
log=$(mktemp)
policy=/usr/sbin/policy-rc.d made_policy=
finish() {
  [[ -z $made_policy ]] || "${as_root[@]}" rm -f "$policy"
  rm -f "$log"
}
trap finish EXIT

# Debian's switch against starting services while packages are configured (101: forbidden by policy).
if [[ ! -e $policy ]]; then
  made_policy=1
  printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
  "${as_root[@]}" chmod 755 "$policy"
fi

apt() {
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 "$@" </dev/null >>"$log" 2>&1
}

# The package lists may be absent or old: refresh them only when the first try fails.
if ! apt install --no-install-recommends "${missing[@]}"; then
  if ! { apt update && apt install --no-install-recommends "${missing[@]}"; }; then
    cat "$log" >&2
    exit 3
  fi
fi
