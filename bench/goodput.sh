#!/usr/bin/env bash
# The speed of Tencrypt between two pods on two nodes, beside the same path in clear and beside wireguard-go.
#
#   goodput.sh [--rounds N] [--seconds S] [--quick] [--controls]
#
#   --rounds N     rounds of all rows (default 5)
#   --seconds S    seconds per iperf3 run (default 5)
#   --quick        3 rounds of 3 seconds
#   --controls     only the rows without Tencrypt
#
# One lab, one path (a pod behind the bridge of node1, vxlan, a routed pod on node2), rounds interleaved and
# each begun with another row:
#   plain               bank-client -> bank-server, no agents
#   wireguard-go        the same two pods, Debian's userspace WireGuard in both
#   Tencrypt            shop-client -> shop-web2 by VIP (port 5201 -> 5301), strict
#   Tencrypt, IPv6      the same by the IPv6 VIP
#   Tencrypt, rekey 2s  shop-web1 -> shop-client2 by VIP, both agents with --rekey-after 2
# then a numbered UDP stream at half of the rate that Tencrypt carries without loss, over 15 rekeys.
#
# Goodput is iperf3's receiver side, one TCP stream, cubic on both sides. A goal that is missed: exit status 1.
# The leak detector runs throughout; Tencrypt's pods must have leaked nothing, and the bank's must trip it.
#
# Needs root (or sudo). Environment:
#   TENCRYPT=PROGRAM       skips the build
#   WIREGUARD_GO=PROGRAM   instead of Debian's newest (bookworm: the one of bookworm-backports)
# shellcheck disable=SC2034  # some variables are read by the files in lib/ alone
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
repo=$(dirname "$here")
lab_sh=$repo/netns-scripts/lab.sh

# shellcheck source-path=SCRIPTDIR source=/dev/null
. "$here/lib/common.sh"
usage() { sed -n '4,9{s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2; exit 2; }

rounds=5 seconds=5 with_tencrypt=1 arguments=("$@")
while (($#)); do
  case $1 in
    --rounds) rounds=$(number "${2:-}") || exit 2; shift ;;
    --seconds) seconds=$(number "${2:-}") || exit 2; shift ;;
    --quick) rounds=3 seconds=3 ;;
    --controls) with_tencrypt=0 ;;
    *) usage ;;
  esac
  shift
done
REQUESTS=3000 REKEYS=15 REKEY_AFTER=2
# The goals: Tencrypt to wireguard-go, Tencrypt with rekeys to Tencrypt without.
GOAL_PEER=1.0 GOAL_REKEY=0.9

extra=()
((!with_tencrypt)) || command -v cc >/dev/null || extra+=(gcc libc6-dev)
"$repo/netns-scripts/deps.sh" wireguard-go wireguard-tools "${extra[@]}"
((!with_tencrypt)) || find_tencrypt
become_root "${BASH_SOURCE[0]}" "${arguments[@]}"
begin

probe() { local pod=$1; shift; in_pod "$pod" "$PYTHON" -I "$here/probe.py" "$@"; }

at_end() {
  rm -f "$WG_SOCKETS/"wg[cs]$$.sock
  rmdir "$WG_SOCKETS" 2>/dev/null || true
}

# shellcheck source-path=SCRIPTDIR
for part in setup stream report; do
  # shellcheck source=/dev/null
  . "$here/lib/$part.sh"
done

# ---- the rows: client and server pod, address of the server, ports of iperf3, round trips and the UDP stream

ROWS=(plain wg)
((!with_tencrypt)) || ROWS+=(tenc tenc6 rekey)
declare -A TITLE=([plain]='plain' [wg]='wireguard-go' [tenc]='Tencrypt' [tenc6]='Tencrypt, IPv6'
  [rekey]="Tencrypt, rekey ${REKEY_AFTER}s")
declare -A CLIENT=([plain]=bank-client [wg]=bank-client [tenc]=shop-client [tenc6]=shop-client [rekey]=shop-web1)
declare -A SERVER=([plain]=bank-server [wg]=bank-server [tenc]=shop-web2 [tenc6]=shop-web2 [rekey]=shop-client2)
declare -A ADDRESS PORT=([plain]=5301 [wg]=5301 [tenc]=5201 [tenc6]=5201 [rekey]=5201)
declare -A PONG=([plain]=7301 [wg]=7301 [tenc]=5202 [tenc6]=5202 [rekey]=5202)
declare -A STREAM=([plain]=7302 [wg]=7302 [tenc]=5203 [tenc6]=5203 [rekey]=5203)
declare -A TUNNEL=([plain]='') GOODPUT=() COST=() P50=() P99=() NO_LOSS=() NO_LOSS_LIMIT=()

# goodput ROW: one iperf3 run; sets gbits (0 when it fails) and cost (CPU seconds of the tunnel's processes per GB).
goodput() {
  local row=$1 json gigabytes before
  before=$(cpu_ticks "$row")
  json=$(in_pod "${CLIENT[$row]}" timeout $((seconds + 30)) \
    iperf3 -J -t "$seconds" -C cubic -p "${PORT[$row]}" -c "${ADDRESS[$row]}") || true
  read -r gbits gigabytes < <(printf '%s' "$json" | jq -er '
    if .end.sender_tcp_congestion != "cubic" or .end.receiver_tcp_congestion != "cubic" then error("not cubic") else . end
    | .end.sum_received | "\(.bits_per_second / 1e9) \(.bytes / 1e9)"' 2>>"$work/log") || {
    printf '%s\n' "$json" >>"$work/log"
    gbits=0 gigabytes=0
  }
  cost=$(awk -v a="$before" -v b="$(cpu_ticks "$row")" -v hz="$(getconf CLK_TCK)" -v g="$gigabytes" \
    'BEGIN { print (g > 0 ? (b - a) / hz / g : 0) }')
}

# cpu_ticks ROW: user and system time so far of the processes that make its tunnel, both ends.
cpu_ticks() {
  local pid sum=0 stat
  for pid in ${TUNNEL[$1]}; do
    stat=$(<"/proc/$pid/stat")
    read -ra stat <<<"${stat##*) }"
    sum=$((sum + stat[11] + stat[12]))
  done
  printf '%d' $sum
}

# agents POD...: the process IDs of the pods' agents.
agents() {
  local pod pid
  for pod; do
    for pid in $(ip netns pids "$TENC_LAB-$pod"); do
      if [[ $(tr '\0' ' ' <"/proc/$pid/cmdline") == 'tencrypt agent '* ]]; then printf '%s ' "$pid"; fi
    done
  done
}

# round_trip ROW: p50 and p99 of small requests on one connection, us; `0 0` when it fails.
round_trip() { probe "${CLIENT[$1]}" ping "${ADDRESS[$1]}" "${PONG[$1]}" $REQUESTS || printf '0 0'; }

one_round() {
  local i row gbits cost p50 p99
  printf 'round %d/%d, Gbit/s:' "$1" "$rounds" >&2
  for ((i = 0; i < ${#ROWS[@]}; i++)); do
    row=${ROWS[(i + $1 - 1) % ${#ROWS[@]}]}
    goodput "$row"
    read -r p50 p99 < <(round_trip "$row")
    GOODPUT[$row]+=" $gbits" COST[$row]+=" $cost" P50[$row]+=" $p50" P99[$row]+=" $p99"
    printf '  %s %.2f' "${TITLE[$row]}" "$gbits" >&2
  done
  printf '\n' >&2
}

# ---- the run

find_wireguard_go
note "Lab $TENC_LAB ..."
lab up
# shellcheck source=/dev/null
. "/run/tencrypt-lab/$TENC_LAB/lab.env"
ADDRESS=([plain]=$BANK_SERVER_V4 [wg]=$WG_SERVER [tenc]=$SPEED_VIP4 [tenc6]=$SPEED_VIP6 [rekey]=$REKEY_VIP4)
make_services
for pod in bank-server shop-web2 shop-client2; do
  # shop-web2 has the lab's own iperf3.
  [[ $pod == shop-web2 ]] || background "$pod" iperf3 -s -p 5301
  background "$pod" "$PYTHON" -I "$here/probe.py" pong 7301
done
for pod in bank-server shop-web2 shop-client2; do await_listening "$pod" 5301 7301; done
wireguard_up
if ((with_tencrypt)); then
  lab protect shop-client shop-web2 | sed 's/^/  /' >&2 || fail "tencrypt launch failed"
  TENC_LAUNCH_ARGS="--rekey-after $REKEY_AFTER" lab protect shop-web1 shop-client2 | sed 's/^/  /' >&2 ||
    fail "tencrypt launch --rekey-after failed"
  TUNNEL[tenc]=$(agents shop-client shop-web2)
  TUNNEL[tenc6]=${TUNNEL[tenc]}
  TUNNEL[rekey]=$(agents shop-web1 shop-client2)
  for row in tenc rekey; do
    [[ $(wc -w <<<"${TUNNEL[$row]}") == 2 ]] || fail "there are not two agents for '${TITLE[$row]}'"
  done
fi
count_rekeys
lab leaks --reset
load=$(cut -d' ' -f1-3 /proc/loadavg)
for row in "${ROWS[@]}"; do round_trip "$row" >/dev/null; done
for ((round = 1; round <= rounds; round++)); do one_round $round; done
rekeys_tcp=$(rekeys)
((!with_tencrypt)) || udp_stream

facts
tables
verdicts
