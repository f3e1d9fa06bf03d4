#!/usr/bin/env bash
# The lab: a small dual-stack cluster of network namespaces on one machine.
#
#   lab.sh up                       make it (lib/topology.sh says what it looks like)
#   lab.sh down                     remove it, and everything that runs in it
#   lab.sh status                   pods, addresses, what is protected
#   lab.sh exec POD -- CMD...       run a program in a pod (or in node1, node2, ext, fabric)
#   lab.sh leaks [--reset | --all]  packets that crossed a pod's link in clear, declared destinations excepted
#   lab.sh leaks --declare ADDRESS/PROTOCOL[/PORT]... | --undeclare | --deep on|off | --judge POD...
#   lab.sh control                  positive control: every leak counter must trip (unprotected lab)
#   lab.sh capture start|stop [POD...] | capture canary STRING
#   lab.sh protect [POD...]         start `tencrypt launch` for pods (default: all but shop-lone)
#   lab.sh unprotect [POD...]       stop it
#
# Environment:
#   TENC_LAB            name of the lab (default tenc); labs with different names coexist
#   TENC_LAB_RP_FILTER  0, 1 or 2: rp_filter of the pods, set before their interfaces are made
#   TENC_PORT           tunnel port (default 51820)
#   TENC_LAB_RANGES=1   launchers get the cluster's ranges
#   TENC_LAUNCH_ARGS    further arguments of `tencrypt launch`
#   TENCRYPT            the program (default target/release/tencrypt)
#
# State: /run/tencrypt-lab/$TENC_LAB/: lab.env (KEY=VALUE lines for scripts and tests), directory/,
# *.key, dns/hosts.d/ (drop a hosts file there to add names), log/, captures/, pids/.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
for part in common topology leaks daemons manifests agents capture control; do
  # shellcheck source=/dev/null
  . "$here/lib/$part.sh"
done

write_env() {
  local pod key service
  {
    cat <<END
TENC_LAB=$LAB
STATE_DIR=$RUN
NODE1_NS=$(ns node1)
NODE1_V4=192.168.77.1
NODE1_V6=fd77::1
NODE1_GATEWAY_V4=10.1.1.1
NODE1_GATEWAY_V6=fd00:10:1:1::1
NODE2_NS=$(ns node2)
NODE2_V4=192.168.77.2
NODE2_V6=fd77::2
FABRIC_NS=$(ns fabric)
EXT_NS=$(ns ext)
EXT_V4=$EXT_V4
EXT_V6=$EXT_V6
EXT_NAME=$EXT_NAME
POD_CIDR4=$POD_CIDR4
POD_CIDR6=$POD_CIDR6
VIP_CIDR4=$VIP_CIDR4
VIP_CIDR6=$VIP_CIDR6
SHOP_POOL4=$SHOP_POOL4
EXTERNAL_IP4=$EXTERNAL_IP4
EXTERNAL_IP6=$EXTERNAL_IP6
NODE_LOCAL_DNS=$NODE_LOCAL_DNS
METADATA=$METADATA
SHOP_POOL6=$SHOP_POOL6
POD_MTU=1450
PROJECT_PODS=$(IFS=,; printf '%s' "${PROJECT_PODS[*]}")
END
    for pod in "${PODS[@]}"; do
      key=${pod^^}
      key=${key//-/_}
      cat <<END
${key}_NS=$(ns "$pod")
${key}_V4=${V4[$pod]}
${key}_V6=${V6[$pod]}
${key}_PROJECT=${PROJECT_OF[$pod]}
${key}_NODE_NS=$(ns "${NODE_OF[$pod]}")
${key}_LINK=p-$pod
END
    done
    for service in "${SERVICES[@]}"; do
      [[ ${SERVICE_V4[$service]} != None ]] || continue
      key=${service#*/}
      key=${key^^}
      [[ $service != kube-system/* ]] || key=DNS
      printf '%s_VIP4=%s\n%s_VIP6=%s\n' "$key" "${SERVICE_V4[$service]}" "$key" "${SERVICE_V6[$service]}"
    done
    cat <<END
DIRECTORY_SHOP=$RUN/directory/shop
DIRECTORY_BANK=$RUN/directory/bank
KEY_SHOP=$RUN/shop.key
KEY_BANK=$RUN/bank.key
TUNNEL_PORT=$PORT
BIG_BYTES=$BIG_BYTES
BIG_SHA256=$(<"$RUN/www/big.sha256")
CANARY=$CANARY
DNS_HOSTSDIR=$RUN/dns/hosts.d
CAPTURES=$RUN/captures
LOGS=$RUN/log
END
  } >"$RUN/lab.env.new"
  mv "$RUN/lab.env.new" "$RUN/lab.env"
}

missing_tools() {
  local tool
  for tool in ip nft tcpdump dnsmasq iperf3 ss nsenter setsid curl dig "$PYTHON"; do
    command -v "$tool" >/dev/null || printf '%s ' "$tool"
  done
}

up() {
  local missing start=${EPOCHREALTIME/./}
  missing=$(missing_tools)
  [[ -z $missing ]] || die "missing: $missing- run $SCRIPTS/deps.sh"
  mkdir -p /run/tencrypt-lab
  mkdir "$RUN" 2>/dev/null || die "lab '$LAB' is up already (or left over: run 'lab.sh down')"
  BIG_JOB=
  trap 'note "up failed: cleaning up"; [[ -z $BIG_JOB ]] || wait "$BIG_JOB" || true; down' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  mkdir "$RUN"/{pids,log,captures}
  make_web_roots
  make_big_file &
  BIG_JOB=$!
  make_topology
  make_leak_detector
  make_etc
  start_daemons
  make_directories
  wait_for_daemons
  # The trap waits for it too: nothing writes into a folder that is being removed.
  wait "$BIG_JOB" || die "no room for the large file under $RUN"
  write_env
  trap - EXIT INT TERM
  note "'$LAB' is up after $(((${EPOCHREALTIME/./} - start) / 1000)) ms"
}

# strays: processes in the lab's namespaces, except those this script descends from.
strays() {
  local name pid=$BASHPID ancestors=' '
  while ((pid > 1)); do
    ancestors+="$pid "
    pid=$(awk '$1 == "PPid:" { print $2 }' "/proc/$pid/status")
  done
  for name in "${NAMESPACES[@]}"; do
    [[ -e /run/netns/$(ns "$name") ]] || continue
    for pid in $(ip netns pids "$(ns "$name")"); do
      [[ $ancestors == *" $pid "* ]] || printf '%s\n' "$pid"
    done
  done
}

# Idempotent; also used by `up` when it fails half-way.
down() {
  local names=() name pids=() tries=100
  trap - EXIT
  if [[ -d $RUN/pids ]]; then
    mapfile -t names < <(ls "$RUN/pids")
    mapfile -t pids < <(printf '%s\n' "${names[@]}" | grep '^launch-' || true)
    stop_recorded TERM 5 "${pids[@]}" || true
    stop_recorded TERM 2 "${names[@]}" || true
  fi
  mapfile -t pids < <(strays)
  if ((${#pids[@]})); then
    kill -s TERM "${pids[@]}" 2>/dev/null || true
    while ((tries-- > 0)) && [[ -n $(strays) ]]; do sleep 0.02; done
    mapfile -t pids < <(strays)
    ((${#pids[@]} == 0)) || kill -s KILL "${pids[@]}" 2>/dev/null || true
  fi
  for name in "${NAMESPACES[@]}"; do
    [[ ! -e /run/netns/$(ns "$name") ]] || ip netns del "$(ns "$name")"
    rm -rf "/etc/netns/$(ns "$name")"
  done
  rm -rf "$RUN"
  rmdir /etc/netns /run/tencrypt-lab 2>/dev/null || true
}

status() {
  local pod state
  if [[ ! -e $RUN/lab.env ]]; then
    printf "lab '%s' is down\n" "$LAB"
    return 1
  fi
  printf '%-14s%-13s%-7s%-12s%-20s%s\n' POD PROJECT NODE IPV4 IPV6 TENCRYPT
  for pod in "${PODS[@]}"; do
    state=-
    if alive "launch-$pod" >/dev/null; then
      state=starting
      ! grep -qs '^protected' "$RUN/log/launch-$pod.out" || state=protected
    fi
    printf '%-14s%-13s%-7s%-12s%-20s%s\n' "$pod" "${PROJECT_OF[$pod]}" "${NODE_OF[$pod]}" "${V4[$pod]}" "${V6[$pod]}" $state
  done
}

exec_in() {
  local name=${1:-}
  shift || true
  [[ ${1:-} != -- ]] || shift
  (($#)) || die "exec POD -- CMD..."
  [[ " ${NAMESPACES[*]} " == *" $name "* ]] || die "no pod '$name' (one of: ${NAMESPACES[*]})"
  exec ip netns exec "$(ns "$name")" "$@"
}

command=${1:-}
shift || true
check_name
case $command in
  up) need_root; up ;;
  down) need_root; down ;;
  status) status ;;
  exec) need_root; need_up; exec_in "$@" ;;
  leaks) need_root; need_up; leaks "$@" ;;
  control) need_root; need_up; control ;;
  capture) need_root; need_up; capture "$@" ;;
  protect) need_root; need_up; protect "$@" ;;
  unprotect) need_root; need_up; unprotect "$@" ;;
  *)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
