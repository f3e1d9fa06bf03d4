# shellcheck shell=bash
# Starting and stopping `tencrypt launch` for pods of the lab.

# The launcher's exit status is kept in a file, since nobody waits for it in this shell. The shell in
# between ends with it.
# shellcheck disable=SC2016  # expanded by the inner shell
LAUNCH_WRAPPER='out=$1 err=$2 rc=$3 pid=$4; shift 4
"$@" </dev/null >"$out" 2>"$err" & echo $! >"$pid"; wait $!; echo $? >"$rc"'

chosen_pods() {
  local pod
  if (($#)); then
    for pod; do
      [[ " ${PROJECT_PODS[*]} " == *" $pod "* ]] || die "'$pod' is no project pod (one of: ${PROJECT_PODS[*]})"
    done
    printf '%s\n' "$@"
  else
    printf '%s\n' "${PROJECT_PODS[@]}" | grep -v '^shop-lone$'
  fi
}

# cluster_arguments PROJECT: what a launcher is told of the rest of the cluster. The launcher of the lab does not run in its
# nodes' namespaces, so it is told their addresses.
cluster_arguments() {
  local project
  for project in shop bank kube-system; do
    [[ $project == "$1" ]] || printf -- '--directory %s ' "$RUN/directory/$project"
  done
  printf -- '--node-cidr %s ' "${NODE_CIDRS[@]}"
  if [[ ${TENC_LAB_RANGES:-0} == 1 ]]; then
    printf -- '--pod-cidr %s ' "$POD_CIDR4" "$POD_CIDR6"
    printf -- '--service-cidr %s ' "$VIP_CIDR4" "$VIP_CIDR6"
  fi
}

launch() {
  local pod=$1 project=${PROJECT_OF[$1]} base=$RUN/log/launch-$1 extra=() tries=200
  read -ra extra <<<"$(cluster_arguments "$project") ${TENC_LAUNCH_ARGS:-}"
  ((PORT == 51820)) || extra+=(--port "$PORT")
  rm -f "$base".{out,err,rc,pid}
  setsid bash -c "$LAUNCH_WRAPPER" launch "$base.out" "$base.err" "$base.rc" "$base.pid" \
    "$TENCRYPT" launch --netns "$(ns "$pod")" --project "$project" --project-key-file "$RUN/$project.key" \
    --directory "$RUN/directory/$project" "${extra[@]}" </dev/null >/dev/null 2>&1 &
  until [[ -s $base.pid ]]; do
    ((tries-- > 0)) || die "could not start $TENCRYPT"
    sleep 0.01
  done
  record "launch-$pod" "$(<"$base.pid")"
}

# Waits until the launcher says `protected`, at most 10 s.
await_protected() {
  local pod=$1 base=$RUN/log/launch-$1 deadline=$((SECONDS + 11))
  until grep -qs '^protected' "$base.out"; do
    if [[ -e $base.rc ]]; then
      note "$pod: tencrypt launch ended with status $(<"$base.rc"):"
    elif ((SECONDS >= deadline)); then
      note "$pod: not protected after 10 s; its log:"
      stop_recorded TERM 5 "launch-$pod" || true
    else
      sleep 0.02
      continue
    fi
    sed 's/^/    /' "$base.out" "$base.err" >&2
    rm -f "$RUN/pids/launch-$pod"
    return 1
  done
  grep -m1 '^protected' "$base.out"
}

protect() {
  local pods=() started=() pod failed=0
  [[ -x $TENCRYPT ]] || die "no program at $TENCRYPT: run 'cargo build --release' or set TENCRYPT"
  mapfile -t pods < <(chosen_pods "$@")
  ((${#pods[@]})) || exit 1
  for pod in "${pods[@]}"; do
    if alive "launch-$pod" >/dev/null; then note "$pod is protected already"; continue; fi
    grep -qx "$pod" "$RUN/judged" || printf '%s\n' "$pod" >>"$RUN/judged"
    launch "$pod"
    started+=("$pod")
  done
  for pod in "${started[@]}"; do await_protected "$pod" || failed=1; done
  return $failed
}

unprotect() {
  local pods=() running=() pod rc failed=0 tries
  if (($#)); then
    mapfile -t pods < <(chosen_pods "$@")
    ((${#pods[@]})) || exit 1
  else
    pods=("${PROJECT_PODS[@]}")
  fi
  for pod in "${pods[@]}"; do
    [[ ! -e $RUN/pids/launch-$pod ]] || running+=("$pod")
  done
  stop_recorded TERM 10 "${running[@]/#/launch-}" || failed=1
  for pod in "${running[@]}"; do
    tries=100
    until [[ -s $RUN/log/launch-$pod.rc ]] || ((tries-- == 0)); do sleep 0.01; done
    rc=$(cat "$RUN/log/launch-$pod.rc" 2>/dev/null) || rc=unknown
    [[ $rc != 0 ]] || continue
    note "$pod: tencrypt launch ended with status $rc:"
    tail -n 20 "$RUN/log/launch-$pod.err" | sed 's/^/    /' >&2
    failed=1
  done
  return $failed
}
