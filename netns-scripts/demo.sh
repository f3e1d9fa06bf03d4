#!/usr/bin/env bash
# The demo: the same traffic between pods without Tencrypt and with it, and what was seen on the wire.
#
#   demo.sh        needs root (or sudo), a Rust toolchain, and Debian or Ubuntu for missing programs
#
# Builds, makes a lab of its own (lab.sh), sends requests from shop-client to the Service `web`, whose
# backends are on its own node and on another, captures on the node side of the three pods' links,
# and prints the comparison. Exit status 0: without Tencrypt the traffic was seen in clear; with it
# no packet was, sealed ones were, and every request was answered. Removes the lab in any case.
#
# Environment: TENCRYPT=PROGRAM skips the build.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
repo=$(dirname "$here")

say() { printf '%s\n' "$*"; }
step() { printf '\n%s\n' "$*"; }
fail() { printf 'demo: %s\n' "$*" >&2; exit 1; }

# build: as the user who called sudo, so that target/ and ~/.cargo stay theirs.
build() {
  # shellcheck disable=SC2016  # expanded by the inner shell
  local script='cd "$0" && PATH=$PATH:$HOME/.cargo/bin
    command -v cargo >/dev/null || { echo "demo: needs a Rust toolchain: https://rustup.rs" >&2; exit 1; }
    exec cargo build --release --quiet'
  if ((EUID == 0)) && [[ -n ${SUDO_USER:-} && $SUDO_USER != root ]]; then
    sudo -u "$SUDO_USER" -H env ${CARGO_TARGET_DIR:+"CARGO_TARGET_DIR=$CARGO_TARGET_DIR"} bash -lc "$script" "$repo"
  else
    bash -c "$script" "$repo"
  fi
}

extra=()
command -v cc >/dev/null || extra+=(gcc libc6-dev)
"$here/deps.sh" "${extra[@]}"
if [[ -z ${TENCRYPT:-} ]]; then
  say "Building (cargo build --release) ..."
  build
  TENCRYPT=$(cd "$repo" && readlink -f "${CARGO_TARGET_DIR:-target}/release/tencrypt")
fi
[[ -x $TENCRYPT ]] || fail "no program at '$TENCRYPT'"

if ((EUID != 0)); then
  command -v sudo >/dev/null || fail "needs root, for network namespaces"
  exec sudo env "TENCRYPT=$TENCRYPT" "${BASH_SOURCE[0]}"
fi
export TENCRYPT TENC_LAB=demo-$$

lab() { "$here/lab.sh" "$@" 2>>"$log"; }

log=$(mktemp)
began=$SECONDS
cleanup() {
  local status=$?
  trap - EXIT
  "$here/lab.sh" down >/dev/null 2>&1 || true
  if ((status != 0)) && [[ -s $log ]]; then
    printf '\nLog of the lab:\n' >&2
    tail -n 40 "$log" | sed 's/^/  /' >&2
  fi
  rm -f "$log"
  exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

PODS=(shop-client shop-web1 shop-web2)
REQUESTS=10

# http URL: how many of the requests, each on a connection of its own, got a 200.
http() {
  # shellcheck disable=SC2016  # expanded by the inner shell
  lab exec shop-client -- sh -c 'for i in $(seq "$2"); do curl -gs -m 5 -o /dev/null -w "%{http_code}\n" "$1"; done' sh "$1" $REQUESTS \
    | grep -c '^200$' || true
}

# count FILTER: packets in the captures that match.
count() {
  local pod
  for pod in "${PODS[@]}"; do tcpdump -nr "$captures/$pod.pcap" "$1" 2>/dev/null; done | wc -l
}

# sample FILTER: one packet of the client's link, as tcpdump shows it: the addresses, then the payload as
# text (a request from its first word; else from where an IPv4 UDP payload begins).
sample() {
  local packet
  packet=$(tcpdump -tqnA -c 1 -r "$captures/shop-client.pcap" "$1" 2>/dev/null | tr '\n\r\t' '\1..') || true
  [[ -n $packet ]] || return 0
  printf '  %s\n' "${packet%%$'\1'*}"
  packet=${packet#*$'\1'}
  packet=${packet//$'\1'/.}
  if [[ $packet == *GET\ * ]]; then packet="GET ${packet#*GET }"; else packet=${packet:28}; fi
  printf '  | %.96s' "$packet"
}

# Packets through the pods' tenc0, as its device counters say.
tenc0_packets() {
  local pod
  for pod in "${PODS[@]}"; do
    # shellcheck disable=SC2016  # awk's own fields
    nsenter --net="/run/netns/$TENC_LAB-$pod" awk '$1 == "tenc0:" { print $3 + $11 }' /proc/net/dev
  done | awk '{ n += $1 } END { print n + 0 }'
}

# measure COLUMN: the traffic of one run; results go to the arrays below.
declare -A clear tunnel inner canary name vip vip6 leaked speed trip shown
measure() {
  local column=$1 before
  lab leaks --reset
  before=$(tenc0_packets)
  lab capture start "${PODS[@]}"
  name[$column]=$(http http://web/)
  vip[$column]=$(http "http://$WEB_VIP4/canary")
  vip6[$column]=$(http "http://[$WEB_VIP6]/canary")
  lab capture stop
  inner[$column]=$(($(tenc0_packets) - before))
  clear[$column]=$(count "$project and not ($nd) and not ($sealed)")
  tunnel[$column]=$(count "$sealed")
  canary[$column]=$(lab capture canary "$CANARY" | cut -d' ' -f2)
  if ((${clear[$column]})); then
    shown[$column]=$(sample "$project and tcp[((tcp[12] & 0xf0) >> 2):4] = 0x47455420")
  else
    shown[$column]=$(sample "ip and $sealed and greater 120")
  fi
  trip[$column]=$(lab exec shop-client -- ping -q -c 200 -i 0.005 "$SHOP_WEB2_V4" | awk -F/ '/^rtt/ { printf "%.3f ms", $5 }' || true)
  speed[$column]=$(lab exec shop-client -- iperf3 -J -t 3 -C cubic -c "$IPERF_VIP4" \
    | jq -r '.end.sum_received.bits_per_second // 0 | . / 1e7 | round / 100 | tostring + " Gbit/s"' || true)
  leaked[$column]=$(lab leaks | awk '$1 == "leaked" { print $2 }' || true)
}

row() { printf '  %-44s %16s %16s\n' "$1" "$2" "$3"; }

step "A lab of two nodes and eight pods, in network namespaces:"
lab up
"$here/lab.sh" status | sed 's/^/  /; s/ *TENCRYPT$//; s/ *-$//'
# shellcheck source=/dev/null
. "/run/tencrypt-lab/$TENC_LAB/lab.env"
captures=$CAPTURES

# Filters: packets between the project's addresses; neighbour discovery; sealed datagrams (both ports
# the tunnel's, and a WireGuard type word of 1 to 4).
hosts="($(sed -n 's/^SHOP_[A-Z0-9]*_V[46]=\(.*\)/\1/p; s/^\(WEB\|IPERF\|ECHO\)_VIP[46]=\(.*\)/\2/p' \
  "/run/tencrypt-lab/$TENC_LAB/lab.env" | awk '{ printf "%s%s", n++ ? " or " : "", $1 }'))"
project="((ip or ip6) and src host $hosts and dst host $hosts)"
nd='icmp6 and ip6[40] >= 133 and ip6[40] <= 137'
sealed="udp src port $TUNNEL_PORT and udp dst port $TUNNEL_PORT and (
  (ip and udp[8] >= 1 and udp[8] <= 4 and udp[9] = 0 and udp[10:2] = 0) or
  (ip6 and ip6[48] >= 1 and ip6[48] <= 4 and ip6[49] = 0 and ip6[50:2] = 0))"

step "Without Tencrypt: requests from shop-client to the Service web, on the wire:"
measure without
say "${shown[without]}"

step "With Tencrypt in every project pod but one:"
lab protect | sed 's/^/  /' | cut -c 1-100
measure with
step "The same requests, on the wire:"
say "${shown[with]}"
stopped=0
lab unprotect || stopped=$?

step "On the node side of the links of ${PODS[*]}:"
row '' without with
row 'packets in clear' "${clear[without]}" "${clear[with]}"
row 'sealed packets (tunnel)' "${tunnel[without]}" "${tunnel[with]}"
row 'packets on tenc0, inside the pods' - "${inner[with]}"
row 'canary bytes found' "${canary[without]}" "${canary[with]}"
row 'leak detector (also during iperf3)' "${leaked[without]}" "${leaked[with]}"
say
row "http://web/" "${name[without]} x 200" "${name[with]} x 200"
row "http://$WEB_VIP4/" "${vip[without]} x 200" "${vip[with]} x 200"
row "http://[$WEB_VIP6]/" "${vip6[without]} x 200" "${vip6[with]} x 200"
say
row 'iperf3 through the VIP, 1 TCP stream (cubic)' "${speed[without]}" "${speed[with]}"
row 'round trip (ping, mean of 200)' "${trip[without]}" "${trip[with]}"

problems=()
expect() { (($1)) || problems+=("$2"); }
expect "${clear[without]} > 0" "without Tencrypt nothing was seen in clear: the check sees nothing"
expect "${canary[without]} > 0" "without Tencrypt the canary was not seen: the check sees nothing"
expect "${clear[with]} == 0" "with Tencrypt ${clear[with]} packets were in clear"
expect "${canary[with]} == 0" "with Tencrypt the canary was seen"
expect "${leaked[with]:-1} == 0" "with Tencrypt the leak detector counted ${leaked[with]}"
expect "${tunnel[with]} > 0" "with Tencrypt no sealed packet was seen"
expect "${inner[with]} > 0" "with Tencrypt nothing went through tenc0"
for column in without with; do
  expect "${name[$column]} == REQUESTS && ${vip[$column]} == REQUESTS && ${vip6[$column]} == REQUESTS" \
    "$column Tencrypt not every request was answered"
done
expect "$stopped == 0" "tencrypt launch did not end cleanly"

printf '\n'
if ((${#problems[@]})); then
  printf 'FAILED: %s\n' "${problems[@]}"
  exit 1
fi
say "Proven: nothing of the project left a pod in clear. ($((SECONDS - began)) s)"
