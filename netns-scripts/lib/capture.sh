# shellcheck shell=bash
# Captures on the node side of project pods' links: $RUN/captures/POD.pcap

capture_listening() { grep -q 'listening on' "$RUN/log/capture-$1.log"; }

capture_start() {
  local pods=("$@") pod
  ((${#pods[@]})) || pods=("${PROJECT_PODS[@]}")
  mkdir -p "$RUN/captures"
  for pod in "${pods[@]}"; do
    is_pod "$pod" || die "'$pod' is no pod"
    ! alive "capture-$pod" >/dev/null || die "already capturing $pod"
    rm -f "$RUN/captures/$pod.pcap"
    spawn "capture-$pod" "${NODE_OF[$pod]}" tcpdump -i "p-$pod" -n -s 0 -B 32768 --immediate-mode -U -Z root \
      -w "$RUN/captures/$pod.pcap"
  done
  for pod in "${pods[@]}"; do wait_for 10 "tcpdump of $pod" capture_listening "$pod"; done
}

capture_stop() {
  local pods=("$@") running=() pod failed=0
  ((${#pods[@]})) || pods=("${PODS[@]}")
  for pod in "${pods[@]}"; do
    [[ ! -e $RUN/pids/capture-$pod ]] || running+=("$pod")
  done
  # What the kernel has handed over is written at once; give tcpdump the time to take the last of it.
  sleep 0.2
  stop_recorded INT 10 "${running[@]/#/capture-}" || failed=1
  for pod in "${running[@]}"; do
    if ! grep -q '^0 packets dropped by kernel' "$RUN/log/capture-$pod.log"; then
      note "capture of $pod is incomplete: $(grep 'dropped by kernel' "$RUN/log/capture-$pod.log")"
      failed=1
    fi
  done
  return $failed
}

# Occurrences of a string's bytes in all captures; prints `canary N`.
capture_canary() {
  local files=("$RUN"/captures/*.pcap)
  [[ -n ${1:-} ]] || die "capture canary STRING"
  [[ -e ${files[0]} ]] || die "nothing was captured"
  printf 'canary %d\n' "$(LC_ALL=C grep -aoF -h -- "$1" "${files[@]}" | wc -l)"
}

capture() {
  local action=${1:-}
  shift || true
  case $action in
    start) capture_start "$@" ;;
    stop) capture_stop "$@" ;;
    canary) capture_canary "$@" ;;
    *) die "capture start|stop [POD...] | capture canary STRING" ;;
  esac
}
