# shellcheck shell=bash
# The positive control of the leak detector: without agents, one packet of every class of leaks is sent through
# every project pod's link, both ways, in both families, and a canary where no class of leaks looks; every counter must have
# moved.

control_packets() {
  local project=$1 pods=() pod next i family address jobs=() args
  for pod in "${PROJECT_PODS[@]}"; do
    [[ ${PROJECT_OF[$pod]} != "$project" ]] || pods+=("$pod")
  done
  for i in "${!pods[@]}"; do
    pod=${pods[i]} next=${pods[(i + 1) % ${#pods[@]}]}
    args=()
    for family in v4 v6; do
      if [[ $family == v4 ]]; then address=${V4[$next]}; else address=${V6[$next]}; fi
      args+=(tcp "$address" 9 udp "$address" 9 port "$address" "$PORT" options "$address" 9
        tunnel "$address" "$PORT" fragment "$address" 9 icmp "$address" 0 other "$address" 0 canary "$address" 0)
    done
    inside "$pod" "$PYTHON" -I "$SCRIPTS/pod.py" send "${args[@]}" &
    jobs+=($!)
    inside "$pod" "$PYTHON" -I "$SCRIPTS/pod.py" frames eth0 &
    jobs+=($!)
    inside "${NODE_OF[$pod]}" "$PYTHON" -I "$SCRIPTS/pod.py" frames "p-$pod" &
    jobs+=($!)
  done
  wait "${jobs[@]}"
}

# Prints the counters that stayed silent; status 1 if there are any.
control() {
  local project silent counters pod family direction
  for project in shop bank; do control_packets $project; done
  sleep 0.1
  counters=$(leak_counters)
  silent=$(awk '$5 == 0 && $1 != "detector" && $4 !~ /^(quote|dns|declared|neighbour)$/' <<<"$counters")
  for pod in "${PROJECT_PODS[@]}"; do
    for family in v4 v6; do
      for direction in out in; do
        grep -q "^$pod $family $direction canary " <<<"$counters" || silent+=$'\n'"$pod $family $direction canary 0"
      done
    done
  done
  if [[ -n $silent ]]; then
    printf 'silent: %s\n' "$silent"
    return 1
  fi
  printf 'control: all %d counters tripped\n' "$(grep -Evc ' (quote|dns|declared|lost) ' <<<"$counters")"
}
