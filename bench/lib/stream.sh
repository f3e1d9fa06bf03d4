# shellcheck shell=bash
# The numbered UDP stream: the rates that are carried without loss, then half of Tencrypt's over rekeys.
# Sourced by goodput.sh.
# shellcheck disable=SC2034,SC2154  # variables shared with goodput.sh

STREAM_HIGHEST=400000 # datagrams per second where the search starts: beyond what the sender can do
STREAM_STEPS=10 STREAM_SECONDS=2

# losses CLIENT SERVER: datagrams dropped so far by full queues of the kernel, on this machine:
# tenc0 of the client (its agent did not get the CPU in time), sockets of the server, the backlog of the CPUs.
# shellcheck disable=SC2016  # awk's own fields
losses() {
  nsenter --net="/run/netns/$TENC_LAB-$1" awk '$1 == "tenc0:" { printf "%d ", $13 }' /proc/net/dev
  nsenter --net="/run/netns/$TENC_LAB-$2" awk '/^Udp6?: *[0-9]/ || /^Udp6?RcvbufErrors/ { n += /^Udp:/ ? $6 : $2 } END { printf "%d ", n }' \
    /proc/net/snmp /proc/net/snmp6
  local drops sum=0
  while read -r _ drops _; do sum=$((sum + 16#$drops)); done </proc/net/softnet_stat
  printf '%d\n' $sum
}

# stream ROW PPS SECONDS: sets sent, received, reached (datagrams per second), lost.
stream() {
  local row=$1 out=$work/sink job tries=200 seconds errors
  : >"$out"
  "$lab_sh" exec "${SERVER[$row]}" -- "$PYTHON" -I "$here/probe.py" sink 7302 </dev/null >"$out" 2>>"$work/log" &
  job=$!
  pids+=("$job")
  until grep -q '^ready' "$out"; do
    ((tries-- > 0)) || fail "the sink of the UDP stream did not start"
    sleep 0.05
  done
  read -r _ sent _ seconds _ errors \
    < <(probe "${CLIENT[$row]}" stream "${ADDRESS[$row]}" "${STREAM[$row]}" "$2" "$3") || fail "the UDP stream did not run"
  wait "$job" || fail "the sink of the UDP stream failed"
  unset 'pids[-1]'
  received=$(awk '$1 == "received" { print $2 }' "$out")
  lost=$((sent - received))
  reached=$(awk -v n="$sent" -v s="$seconds" 'BEGIN { printf "%d", n / s }')
  ((errors == 0)) || note "  $errors sends failed"
}

kilo() { awk -v n="$1" 'BEGIN { printf "%.1f", n / 1000 }'; }

# search_rate ROW: the highest rate without a loss, to 5 %; a rate counts as lossy when two runs in a row lose.
search_rate() {
  local row=$1 low=0 high=$STREAM_HIGHEST step pps try limit=''
  for ((step = 0; step < STREAM_STEPS && (high - low) * 20 > high; step++)); do
    pps=$(((low + high) / 2))
    for try in 1 2; do
      stream "$row" $pps $STREAM_SECONDS
      note "UDP stream, ${TITLE[$row]}, $(kilo "$reached") kpps: lost $lost of $sent"
      if ((lost == 0)); then break; fi
    done
    if ((lost > 0)); then
      high=$((reached < pps ? reached : pps)) limit=''
    else
      low=$reached
      # The sender cannot do more than this.
      if ((reached * 100 < pps * 97)); then high=$reached limit='all that the sender can do'; fi
    fi
    ((low < high)) || break
  done
  NO_LOSS["$row"]=$low NO_LOSS_LIMIT["$row"]=$limit
}

udp_stream() {
  local row half before tenc0 sockets backlog tenc0_now sockets_now backlog_now
  for row in plain wg tenc; do search_rate $row; done
  [[ ${NO_LOSS[tenc]} != 0 ]] || fail "no rate without loss was found"
  # A session stands before the first datagram: what is measured is the rekey, not the first handshake.
  round_trip rekey >/dev/null
  before=$(rekeys)
  read -r tenc0 sockets backlog < <(losses "${CLIENT[rekey]}" "${SERVER[rekey]}")
  note "UDP stream at half of $(kilo "${NO_LOSS[tenc]}") kpps over $REKEYS rekeys ..."
  half=$(awk -v n="${NO_LOSS[tenc]}" 'BEGIN { printf "%d", n / 2 }')
  stream rekey "$half" $((REKEYS * REKEY_AFTER + 4))
  rekeys_udp=$(($(rekeys) - before))
  read -r tenc0_now sockets_now backlog_now < <(losses "${CLIENT[rekey]}" "${SERVER[rekey]}")
  lost_at="full queues: tenc0 $((tenc0_now - tenc0)), sockets $((sockets_now - sockets)), CPU backlog $((backlog_now - backlog))"
}
