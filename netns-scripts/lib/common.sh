# shellcheck shell=bash
# The plan of the lab as data, and the helpers that every part uses: names, addresses, processes.
#
# Everything lives in namespaces called $TENC_LAB-<name>, so addresses are the same in every lab and
# labs with different names do not meet. The host's own namespace is never touched.
# shellcheck disable=SC2034  # the tables are read by the files that source this one

PATH=$PATH:/usr/sbin:/sbin
LAB=${TENC_LAB:-tenc}
PORT=${TENC_PORT:-51820}
RUN=/run/tencrypt-lab/$LAB
SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TENCRYPT=${TENCRYPT:-${CARGO_TARGET_DIR:-$SCRIPTS/../target}/release/tencrypt}
# The distribution's interpreter first: version managers put slow wrappers in front of it.
PYTHON=/usr/bin/python3
[[ -x $PYTHON ]] || PYTHON=python3

POD_CIDR4=10.1.0.0/16       POD_CIDR6=fd00:10:1::/48
VIP_CIDR4=10.96.0.0/16      VIP_CIDR6=fd00:10:96::/112
EXT_V4=203.0.113.10         EXT_V6=2001:db8:113::10     EXT_NAME=www.example.test
ZONE=cluster.local
# Addresses of the nodes that no Node object names: bridges, gateways of routed pods, tunnels.
NODE_CIDRS=(10.1.1.1/32 fd00:10:1:1::1/128 fe80::1/128 10.1.1.0/32 10.1.2.0/32)

# name  project  node  IPv4  IPv6
POD_TABLE='
shop-client   shop         node1  10.1.1.11  fd00:10:1:1::11
shop-web1     shop         node1  10.1.1.12  fd00:10:1:1::12
bank-client   bank         node1  10.1.1.21  fd00:10:1:1::21
kube-dns      kube-system  node1  10.1.1.53  fd00:10:1:1::53
shop-client2  shop         node2  10.1.2.11  fd00:10:1:2::11
shop-web2     shop         node2  10.1.2.12  fd00:10:1:2::12
shop-lone     shop         node2  10.1.2.13  fd00:10:1:2::13
bank-server   bank         node2  10.1.2.22  fd00:10:1:2::22
'

# project  service  IPv4 VIP  IPv6 VIP  port name  protocol  port  target port  endpoints
# A headless service has None for its VIPs and no DNAT.
SERVICE_TABLE='
kube-system  kube-dns      10.96.0.10  fd00:10:96::a    dns        udp  53    53    kube-dns
kube-system  kube-dns      10.96.0.10  fd00:10:96::a    dns-tcp    tcp  53    53    kube-dns
shop         web           10.96.1.1   fd00:10:96::101  http       tcp  80    8080  shop-web1,shop-web2
shop         web-headless  None        None             http       tcp  8080  8080  shop-web1,shop-web2
shop         echo          10.96.1.2   fd00:10:96::102  echo       udp  7     7007  shop-web1,shop-web2
shop         portal        10.96.1.4   fd00:10:96::104  http       tcp  80    8080  shop-web1,shop-web2
shop         portal        10.96.1.4   fd00:10:96::104  echo       udp  7     7007  shop-web1,shop-web2
shop         iperf         10.96.1.3   fd00:10:96::103  iperf-tcp  tcp  5201  5301  shop-web2
shop         iperf         10.96.1.3   fd00:10:96::103  iperf-udp  udp  5201  5301  shop-web2
bank         ledger        10.96.2.1   fd00:10:96::201  http       tcp  80    8080  bank-server
'

# For services that a test invents at run time: port 80 of each of these addresses leads to the web pods of shop.
SHOP_POOL4=10.96.64.0/18    SHOP_POOL6=fd00:10:96::4000/114

# How shop/portal is reached besides its VIP, as kube-proxy has it: every node's own addresses at the nodePorts, externalIPs and a
# load balancer's ingress address, which is a node's, at the Service's ports; and the hostPorts of shop-web1 on its node.
PORTAL=shop/portal
EXTERNAL_IP4=198.51.100.7   EXTERNAL_IP6=2001:db8:198::7
INGRESS4=192.168.77.2       INGRESS6=fd77::2
declare -A NODE_PORT=([http]=30080 [echo]=30007) HOST_PORT=([http]=18080 [echo]=17007)
HOST_PORT_POD=shop-web1
declare -A NODE_V4=([node1]="192.168.77.1, 10.1.1.1, 10.1.1.0" [node2]="192.168.77.2, 10.1.2.0")
declare -A NODE_V6=([node1]="fd77::1, fd00:10:1:1::1" [node2]="fd77::2")

# NodeLocal DNSCache and the cloud's metadata server: link-local addresses on every node.
NODE_LOCAL_DNS=169.254.20.10    METADATA=169.254.169.254

# What a project's pods may exchange in clear with the outside: address, protocol, port of either end (* is any).
DECLARED_TABLE="
10.96.0.10          dns
fd00:10:96::a       dns
$NODE_LOCAL_DNS     dns
10.96.0.10          icmp  *
fd00:10:96::a       icmp  *
$EXT_V4             tcp   80
$EXT_V6             tcp   80
$EXT_V4             icmp  *
$EXT_V6             icmp  *
$METADATA           tcp   80
10.96.2.1           tcp   80
fd00:10:96::201     tcp   80
10.1.2.22           tcp   8080
fd00:10:1:2::22     tcp   8080
10.1.1.21           tcp   8080
fd00:10:1:1::21     tcp   8080
$(for address in 10.1.1.0 10.1.1.1 10.1.2.0 192.168.77.1 192.168.77.2 fe80::1 fe80::77:1 fe80::77:2 fd00:10:1:1::1 fd77::1 fd77::2; do
  printf '%s tcp 8080\n%s icmp *\n' $address $address
done)
192.168.77.254      icmp  *
fd77::fe            icmp  *
"

PODS=() PROJECT_PODS=()
declare -A PROJECT_OF NODE_OF V4 V6
while read -r name project node v4 v6; do
  [[ -n $name ]] || continue
  PODS+=("$name")
  [[ $project == kube-system ]] || PROJECT_PODS+=("$name")
  PROJECT_OF[$name]=$project NODE_OF[$name]=$node V4[$name]=$v4 V6[$name]=$v6
done <<<"$POD_TABLE"

# By `project/service`. SERVICE_PORTS has lines of: port name, protocol, port, target port.
SERVICES=()
declare -A SERVICE_V4 SERVICE_V6 SERVICE_PORTS SERVICE_PODS
while read -r project name v4 v6 ports_and_pods; do
  [[ -n $name ]] || continue
  service=$project/$name
  [[ -n ${SERVICE_V4[$service]:-} ]] || SERVICES+=("$service")
  SERVICE_V4[$service]=$v4 SERVICE_V6[$service]=$v6
  SERVICE_PORTS[$service]+=${SERVICE_PORTS[$service]:+$'\n'}${ports_and_pods% *}
  SERVICE_PODS[$service]=${ports_and_pods##* }
done <<<"$SERVICE_TABLE"
unset project name node v4 v6 service ports_and_pods

NODES=(node1 node2)
NAMESPACES=(fabric node1 node2 ext "${PODS[@]}")

die() { printf 'lab: %s\n' "$*" >&2; exit 1; }
note() { printf 'lab: %s\n' "$*" >&2; }

# ns NAME: the namespace's full name.
ns() { printf '%s-%s' "$LAB" "$1"; }

# inside NAME CMD...: run in the network namespace alone (no mounts; /proc/sys/net follows).
inside() { local name=$1; shift; nsenter --net="/run/netns/$LAB-$name" -- "$@"; }

is_pod() { [[ -n ${1:-} && -n ${PROJECT_OF[$1]:-} ]]; }

need_root() { [[ $EUID -eq 0 ]] || die "needs root (namespaces): run it with sudo"; }

# The tunnel port of a lab is the one it was made with.
need_up() {
  [[ -e $RUN/lab.env ]] || die "lab '$LAB' is not up: run '$SCRIPTS/lab.sh up'"
  PORT=$(sed -n 's/^TUNNEL_PORT=//p' "$RUN/lab.env")
}

check_name() {
  [[ $LAB =~ ^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || die "TENC_LAB='$LAB': use lower-case letters, digits and '-'"
  [[ $PORT =~ ^[0-9]{1,5}$ && $PORT -ge 1 && $PORT -le 65535 ]] || die "TENC_PORT='$PORT' is no port"
  [[ ${TENC_LAB_RP_FILTER:-0} =~ ^[012]$ ]] || die "TENC_LAB_RP_FILTER='$TENC_LAB_RP_FILTER': use 0, 1 or 2"
}

# start_time PID: the kernel's start time of a process; with the PID it names one process for ever.
start_time() {
  local stat
  { stat=$(<"/proc/$1/stat"); } 2>/dev/null || return 1
  read -ra stat <<<"${stat##*) }"
  printf '%s' "${stat[19]}"
}

# record NAME PID: remember a process that the lab started.
record() { printf '%s %s\n' "$2" "$(start_time "$2")" >"$RUN/pids/$1"; }

# alive NAME: prints the PID if the recorded process still runs (and is the recorded one).
alive() {
  local pid started
  { read -r pid started <"$RUN/pids/$1"; } 2>/dev/null || return 1
  [[ -n $started && $(start_time "$pid") == "$started" ]] || return 1
  # A zombie has ended; only its parent has not looked yet.
  ! grep -q '^State:[[:space:]]*Z' "/proc/$pid/status" 2>/dev/null || return 1
  printf '%s' "$pid"
}

# spawn NAME NAMESPACE CMD...: start a daemon in a namespace, in a session of its own.
spawn() {
  local name=$1 namespace=$2
  shift 2
  setsid ip netns exec "$(ns "$namespace")" "$@" </dev/null >"$RUN/log/$name.log" 2>&1 &
  record "$name" $!
}

# stop_recorded SIGNAL SECONDS NAME...: signal, wait, then kill what is left.
stop_recorded() {
  local signal=$1 deadline=$((SECONDS + $2)) name pid left
  shift 2
  for name; do
    if pid=$(alive "$name"); then kill -s "$signal" "$pid" 2>/dev/null || true; fi
  done
  while :; do
    left=()
    for name; do
      if alive "$name" >/dev/null; then left+=("$name"); else rm -f "$RUN/pids/$name"; fi
    done
    ((${#left[@]})) || return 0
    ((SECONDS < deadline)) || break
    sleep 0.02
  done
  for name in "${left[@]}"; do
    note "$name did not stop: killed"
    if pid=$(alive "$name"); then kill -s KILL "$pid" 2>/dev/null || true; fi
    rm -f "$RUN/pids/$name"
  done
  return 1
}

# wait_for SECONDS WHAT CMD...: poll a command until it succeeds.
wait_for() {
  local tries=$(($1 * 50)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    ((tries-- > 0)) || die "$what: not ready in time"
    sleep 0.02
  done
}
