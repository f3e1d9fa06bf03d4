# shellcheck shell=bash
# The machine's facts, the tables, the verdicts. Sourced by goodput.sh.
# shellcheck disable=SC2034,SC2154  # variables shared with goodput.sh

# stats VALUE...: median, lowest, highest.
stats() {
  printf '%s\n' "$@" | sort -g | awk '{ v[NR] = $1 }
    END { m = int((NR + 1) / 2); print (NR % 2 ? v[m] : (v[m] + v[m + 1]) / 2), v[1], v[NR] }'
}

# middle VALUE...: the median alone.
middle() { stats "$@" | cut -d' ' -f1; }

# ratio A B
ratio() { awk -v a="$1" -v b="$2" 'BEGIN { if (b > 0) printf "%.2f", a / b; else print "-" }'; }

fact() { printf '  %-22s %s\n' "$1" "$2"; }

facts() {
  printf '\nMachine\n'
  fact CPU "$(awk -F': ' '/^model name/ { print $2; exit }' /proc/cpuinfo), $(nproc) cores"
  fact kernel "$(uname -sr)"
  fact 'load at the start' "$load"
  fact path 'pod - bridge - vxlan over veth - routed pod, one machine; segmentation offloads on'
  fact MTU "pods $POD_MTU, wireguard-go $WG_MTU"
  fact 'congestion control' 'cubic on both sides'
  fact iperf3 "$(iperf3 --version | sed -n '1s/^iperf //p'), 1 TCP stream, $rounds interleaved rounds of $seconds s, receiver side"
  fact wireguard-go "$wireguard_go_from ($("$wireguard_go" --version | sed -n '1s/^wireguard-go //p'))"
  ((!with_tencrypt)) || fact Tencrypt "$("$TENCRYPT" --version), strict, by VIP with DNAT"
}

tables() {
  local row values plain
  read -ra values <<<"${GOODPUT[plain]}"
  plain=$(middle "${values[@]}")
  printf '\n%-22s %5s %9s %9s %9s %9s %12s\n' 'GOODPUT, Gbit/s' N MEDIAN MIN MAX 'TO PLAIN' 'CPU s per GB'
  for row in "${ROWS[@]}"; do
    read -ra values <<<"${GOODPUT[$row]}"
    # shellcheck disable=SC2046  # three words
    printf '%-22s %5d %9.2f %9.2f %9.2f' "${TITLE[$row]}" ${#values[@]} $(stats "${values[@]}")
    printf ' %9s' "$(ratio "$(middle "${values[@]}")" "$plain")"
    read -ra values <<<"${COST[$row]}"
    if [[ -n ${TUNNEL[$row]} ]]; then printf ' %12.2f\n' "$(middle "${values[@]}")"; else printf ' %12s\n' -; fi
  done
  printf '(CPU: user and system time of the tunnel processes, both ends.)\n'
  printf '\n%-22s %5s %9s %9s %9s %9s   %s\n' 'ROUND TRIP (TCP), us' N P50 MIN MAX P99 "(64 bytes, $REQUESTS each, medians)"
  for row in "${ROWS[@]}"; do
    read -ra values <<<"${P50[$row]}"
    # shellcheck disable=SC2046  # three words
    printf '%-22s %5d %9.1f %9.1f %9.1f' "${TITLE[$row]}" ${#values[@]} $(stats "${values[@]}")
    read -ra values <<<"${P99[$row]}"
    printf ' %9.1f\n' "$(middle "${values[@]}")"
  done
  ((with_tencrypt)) || return 0
  printf '\n%-22s %9s %9s %9s %9s\n' 'UDP, 1200 bytes each' KPPS MBIT/S SENT LOST
  for row in plain wg tenc; do
    printf '%-22s %9s %9s %9s %9d%s\n' "${TITLE[$row]}: no loss" "$(kilo "${NO_LOSS[$row]}")" "$(mbit "${NO_LOSS[$row]}")" \
      - 0 "${NO_LOSS_LIMIT[$row]:+   (${NO_LOSS_LIMIT[$row]})}"
  done
  printf '%-22s %9s %9s %9d %9d\n' "half, $rekeys_udp rekeys" "$(kilo "$reached")" "$(mbit "$reached")" "$sent" "$lost"
  ((lost == 0)) || printf '%-22s %s\n' '' "$lost_at"
}

mbit() { awk -v n="$1" 'BEGIN { printf "%.0f", n * 1200 * 8 / 1e6 }'; }

# verdict MET GOAL MEASURED
verdict() {
  local word=met
  ((${1})) || { word=MISSED; missed=$((missed + 1)); }
  printf '%-8s%-58s%s\n' "$word" "$2" "$3"
}

at_least() { awk -v a="$1" -v b="$2" 'BEGIN { print (a != "-" && a + 0 >= b + 0) ? 1 : 0 }'; }

# An iperf3 run that failed stands as 0 among the values.
runs_failed() { tr ' ' '\n' <<<"${GOODPUT[*]}" | grep -cx 0 || true; }

verdicts() {
  local missed=0 leaked control peer rekey plain tenc wg failed
  failed=$(runs_failed)
  printf '\n'
  if ((with_tencrypt)); then
    # shellcheck disable=SC2086  # lists of numbers
    tenc=$(middle ${GOODPUT[tenc]}) wg=$(middle ${GOODPUT[wg]}) rekey=$(middle ${GOODPUT[rekey]})
    peer=$(ratio "$tenc" "$wg") rekey=$(ratio "$rekey" "$tenc")
    # The bank's pods talk in clear through the same detector: its positive control.
    read -r leaked control < <(lab leaks | awk '/^shop-/ { s += $5 } /^bank-/ { b += $5 } END { print s + 0, b + 0 }')
    verdict "$(at_least "$peer" "$GOAL_PEER")" "goodput of Tencrypt to wireguard-go: at least $GOAL_PEER" "$peer"
    verdict "$(at_least "$rekey" "$GOAL_REKEY")" "goodput with rekeys every $REKEY_AFTER s to without: at least $GOAL_REKEY" \
      "$rekey ($rekeys_tcp handshakes)"
    verdict "lost == 0" "UDP stream at half the no-loss rate: lost 0" "$lost of $sent"
    verdict "rekeys_udp >= REKEYS" "rekeys during that stream: at least $REKEYS" "$rekeys_udp"
    verdict "leaked == 0 && control > 0" "packets of Tencrypt's pods in clear: 0" \
      "$leaked (positive control, the bank's pods: $control)"
  fi
  verdict "failed == 0" "iperf3 runs that failed: 0" "$failed"
  printf '(%d s)\n' $((SECONDS - began))
  ((missed == 0))
}
