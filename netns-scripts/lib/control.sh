# shellcheck shell=bash
# The positive control of the leak detector: without agents, one packet of every class is sent through
# every project pod's link, both ways, in both families; every counter must have moved.

# A VIP that answers, for the pods of a project: its packets have the VIP as source on the way back.
control_vip() {
  case $1/$2 in
    shop/v4) printf 10.96.1.1 ;;
    shop/v6) printf fd00:10:96::101 ;;
    bank/v4) printf 10.96.2.1 ;;
    bank/v6) printf fd00:10:96::201 ;;
  esac
}

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
      args+=(vip "$(control_vip "$project" $family)" 80 tcp "$address" 9 udp "$address" 9 port "$address" "$PORT"
        tunnel "$address" "$PORT" fragment "$address" 9 icmp "$address" 0 other "$address" 0)
    done
    inside "$pod" "$PYTHON" -I "$SCRIPTS/pod.py" send "${args[@]}" &
    jobs+=($!)
  done
  wait "${jobs[@]}"
}

# Prints the counters that stayed silent; status 1 if there are any.
control() {
  local project silent
  for project in shop bank; do control_packets $project; done
  sleep 0.1
  silent=$(leak_counters | awk '$5 == 0 && $4 != "quote"')
  if [[ -n $silent ]]; then
    printf 'silent: %s\n' "$silent"
    return 1
  fi
  printf 'control: all %d counters tripped\n' "$(leak_counters | grep -vc ' quote ')"
}
