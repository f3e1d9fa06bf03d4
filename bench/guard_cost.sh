#!/usr/bin/env bash
# What the guard costs the traffic that is none of its business: from a pod of the project to a pod of another.
#
#   guard_cost.sh [--pairs N] [--seconds S]
#
#   --pairs N      pairs of runs with and without the guard (default 80; at least 20 for a verdict)
#   --seconds S    seconds per iperf3 run (default 1)
#
# One lab, one path (shop-client behind the bridge of node1, vxlan, bank-server routed on node2), one TCP stream in clear.
# Each pair is two runs one after the other, their order drawn by lot: with `tencrypt launch` in the pod (strict: guard,
# routes, agent), and after its stop. Everything else stays. iperf3 has the highest priority: what else the machine does
# disturbs it less.
#
# The ratio of a pair is goodput with the guard to goodput without. Met when the 95 % interval of the median ratio (that of
# the sign test: order statistics, no assumption about the noise) contains 1 or begins at 0.95 or above; else exit status 1.
#
# Needs root (or sudo). Environment: TENCRYPT=PROGRAM skips the build.
# shellcheck disable=SC2034  # some variables are read by the files in lib/ alone
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
repo=$(dirname "$here")
lab_sh=$repo/netns-scripts/lab.sh

# shellcheck source=SCRIPTDIR/lib/common.sh
. "$here/lib/common.sh"
usage() { sed -n '4,7{s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2; exit 2; }

pairs=80 seconds=1 arguments=("$@")
while (($#)); do
  case $1 in
    --pairs) pairs=$(number "${2:-}") || exit 2; shift ;;
    --seconds) seconds=$(number "${2:-}") || exit 2; shift ;;
    *) usage ;;
  esac
  shift
done
PAIRS_MIN=20 GOAL=0.95
CLIENT=shop-client SERVER=bank-server PORT=5301

extra=()
[[ -n ${TENCRYPT:-} ]] || command -v cc >/dev/null || extra+=(gcc libc6-dev)
"$repo/netns-scripts/deps.sh" "${extra[@]}"
find_tencrypt
become_root "${BASH_SOURCE[0]}" "${arguments[@]}"
begin

# guarded with|without: brings the pod there, and looks whether it is.
guarded() {
  local tables
  if [[ $1 == with ]]; then lab protect $CLIENT >/dev/null; else lab unprotect $CLIENT; fi || fail "the pod cannot be brought to '$1'"
  tables=$(in_pod $CLIENT nft list tables)
  case $1 in
    with) [[ $tables == *'inet tencrypt'* && $tables == *'netdev tencrypt'* ]] ;;
    without) [[ $tables != *tencrypt* ]] ;;
  esac || fail "'$1' the guard the pod has these tables: ${tables:-none}"
}

# goodput: Gbit/s of one run, receiver side.
goodput() {
  in_pod $CLIENT timeout $((seconds + 30)) nice -n -20 iperf3 -J -t "$seconds" -C cubic -p $PORT -c "$BANK_SERVER_V4" |
    jq -er '.end.sum_received.bits_per_second / 1e9' 2>>"$work/log" || fail "iperf3 failed"
}

# one_pair NUMBER: adds its ratio.
one_pair() {
  local order=(with without) state ratio
  local -A gbits
  ((RANDOM % 2)) || order=(without with)
  for state in "${order[@]}"; do
    guarded "$state"
    gbits[$state]=$(goodput)
  done
  ratio=$(awk -v a="${gbits[with]}" -v b="${gbits[without]}" 'BEGIN { printf "%.4f", a / b }')
  ratios+=("$ratio")
  with+=("${gbits[with]}") without+=("${gbits[without]}")
  printf '%4d   %-14s %9.2f %9.2f %9s\n' "$1" "${order[0]} first" "${gbits[with]}" "${gbits[without]}" "$ratio"
}

# interval VALUE...: the sign test's 95 % interval of the median: the widest pair of order statistics k and n + 1 - k
# outside of which the median lies with a chance of at most 5 %. Prints both ends and that interval's own level.
interval() {
  printf '%s\n' "$@" | sort -g | awk '{ v[NR] = $1 }
    END {
      p = 0.5 ^ NR; below = 0
      for (k = 0; below + p <= 0.025; k++) { below += p; p *= (NR - k) / (k + 1) }
      if (k == 0) { print "- -", 0; exit }
      printf "%s %s %.1f\n", v[k], v[NR + 1 - k], 100 * (1 - 2 * below)
    }'
}

note "Lab $TENC_LAB ..."
lab up
# shellcheck source=/dev/null
. "/run/tencrypt-lab/$TENC_LAB/lab.env"
background $SERVER nice -n -20 iperf3 -s -p $PORT
await_listening $SERVER $PORT
load=$(cut -d' ' -f1-3 /proc/loadavg)
goodput >/dev/null
ratios=() with=() without=()
printf '%4s   %-14s %9s %9s %9s\n' PAIR ORDER WITH WITHOUT RATIO
for ((pair = 1; pair <= pairs; pair++)); do one_pair $pair; done

printf '\nMachine\n'
fact CPU "$(awk -F': ' '/^model name/ { print $2; exit }' /proc/cpuinfo), $(nproc) cores"
fact kernel "$(uname -sr)"
fact 'load at the start' "$load"
fact path 'pod - bridge - vxlan over veth - routed pod, one machine; segmentation offloads on; in clear'
fact MTU "$POD_MTU"
fact iperf3 "$(iperf3 --version | sed -n '1s/^iperf //p'), 1 TCP stream, $pairs pairs of $seconds s each, receiver side"
fact Tencrypt "$("$TENCRYPT" --version), strict"
printf '\n%-22s %5s %9s %9s %9s\n' 'PLAIN TRAFFIC, Gbit/s' N MEDIAN MIN MAX
# shellcheck disable=SC2046,SC2183  # three words each
printf '%-22s %5d %9.2f %9.2f %9.2f\n' 'with the guard' "$pairs" $(stats "${with[@]}") 'without' "$pairs" $(stats "${without[@]}")
median=$(middle "${ratios[@]}")
read -r low high level < <(interval "${ratios[@]}")
printf '\nmedian ratio %.3f, %s %% interval %s to %s\n' "$median" "$level" "$low" "$high"

missed=0
verdict "pairs >= PAIRS_MIN" "pairs: at least $PAIRS_MIN" "$pairs"
met=$(awk -v l="$low" -v h="$high" -v g=$GOAL 'BEGIN { print (l != "-" && ((l <= 1 && h >= 1) || l >= g)) ? 1 : 0 }')
verdict "$met" "the interval contains 1, or begins at $GOAL or above" "$low to $high"
awk -v l="$low" -v h="$high" 'BEGIN { exit !(h - l > 0.2) }' &&
  note "(An interval this wide says little: run it on an idle machine, or with more pairs.)"
printf '(%d s)\n' $((SECONDS - began))
((missed == 0))
