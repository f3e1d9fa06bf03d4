# shellcheck shell=bash
# What the benchmark adds to the lab: two Services of its own, wireguard-go in the bank's pods, a counter of
# handshakes. Sourced by goodput.sh.
# shellcheck disable=SC2034,SC2154  # variables shared with goodput.sh

# ---- Services: iperf3, round trips and the UDP stream by VIP, one backend each

SPEED_VIP4=10.96.1.20 SPEED_VIP6=fd00:10:96::114
REKEY_VIP4=10.96.1.21 REKEY_VIP6=fd00:10:96::115

service_port() { printf '  - {name: %s, port: %d, protocol: %s, targetPort: %d}\n' "$@"; }
slice_port() { printf -- '- {name: %s, port: %d, protocol: %s}\n' "$1" "$4" "$3"; }
each_port() {
  "$1" iperf 5201 TCP 5301
  "$1" pong 5202 TCP 7301
  "$1" stream 5203 UDP 7302
}

# service NAME POD VIP4 VIP6 POD4 POD6: its manifests, into the directory of the project.
service() {
  local name=$1 pod=$2 family address
  cat <<END >"$DIRECTORY_SHOP/service-$name.yaml"
apiVersion: v1
kind: Service
metadata: {name: $name, namespace: shop}
spec:
  clusterIP: $3
  clusterIPs: [$3, "$4"]
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: PreferDualStack
  selector: {app: $name}
  type: ClusterIP
  ports:
$(each_port service_port)
END
  for family in IPv4 IPv6; do
    if [[ $family == IPv4 ]]; then address=$5; else address=$6; fi
    cat <<END >"$DIRECTORY_SHOP/endpointslice-$name-${family,,}.yaml"
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: $name-${family,,}
  namespace: shop
  labels: {kubernetes.io/service-name: $name}
addressType: $family
endpoints:
- addresses: ["$address"]
  conditions: {ready: true, serving: true, terminating: false}
  nodeName: node2
  targetRef: {kind: Pod, name: $pod, namespace: shop}
ports:
$(each_port slice_port)
END
  done
}

make_services() {
  service speed shop-web2 "$SPEED_VIP4" "$SPEED_VIP6" "$SHOP_WEB2_V4" "$SHOP_WEB2_V6"
  service rekey shop-client2 "$REKEY_VIP4" "$REKEY_VIP6" "$SHOP_CLIENT2_V4" "$SHOP_CLIENT2_V6"
}

# await_listening POD PORT...: until programs listen on these TCP ports.
await_listening() {
  local pod=$1 port tries
  shift
  for port; do
    tries=100
    until [[ -n $(in_pod "$pod" ss -Hltn "sport = :$port") ]]; do
      ((tries-- > 0)) || fail "nothing listens on port $port of $pod"
      sleep 0.05
    done
  done
}

# ---- wireguard-go

# The device MTU is what a Tencrypt route for IPv4 has on this link: equal segments. (wg-quick's own
# choice would be 1370.)
WG_MTU=1376 WG_PORT=51900
WG_CLIENT=10.200.77.1 WG_SERVER=10.200.77.2
WG_SOCKETS=/var/run/wireguard

# find_wireguard_go: the installed package; on bookworm, whose version has no offloads yet, the one of
# bookworm-backports. It is only unpacked: neither the installed package nor apt's configuration change.
find_wireguard_go() {
  local suite apt=()
  wireguard_go=${WIREGUARD_GO:-}
  if [[ -n $wireguard_go ]]; then wireguard_go_from="$wireguard_go"; return; fi
  wireguard_go=$(command -v wireguard-go)
  wireguard_go_from="package $(dpkg-query -W -f '${Version}' wireguard-go)"
  # shellcheck source=/dev/null
  suite=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
  [[ $suite == bookworm ]] || return 0
  mkdir -p "$work/apt/lists/partial" "$work/apt/cache/archives/partial"
  printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian %s-backports main\n' \
    "$suite" >"$work/apt/sources.list"
  apt=(apt-get -qq -o "Dir::Etc::sourcelist=$work/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o "Dir::State::lists=$work/apt/lists" -o "Dir::Cache=$work/apt/cache" -o APT::Sandbox::User=root
    -o Acquire::http::Timeout=10 -o Acquire::Retries=0)
  if ! (cd "$work/apt" && "${apt[@]}" update && "${apt[@]}" download wireguard-go && dpkg -x wireguard-go_*.deb .) \
    </dev/null >>"$work/log" 2>&1; then
    note "bookworm-backports cannot be reached: comparing with the older $wireguard_go_from"
    return 0
  fi
  wireguard_go=$work/apt/usr/bin/wireguard-go
  wireguard_go_from="package $(dpkg-deb -f "$work"/apt/wireguard-go_*.deb Version)"
}

# wireguard_end POD DEVICE OWN-ADDRESS KEY PEER-PUBLIC-KEY PEER-ADDRESS PEER-ENDPOINT
wireguard_end() {
  local pod=$1 device=$2 tries=100
  background "$pod" env LOG_LEVEL=error "$wireguard_go" --foreground "$device"
  TUNNEL[wg]+=" ${pids[-1]}"
  until [[ -S $WG_SOCKETS/$device.sock ]]; do
    ((tries-- > 0)) || fail "wireguard-go did not start in $pod"
    sleep 0.05
  done
  in_pod "$pod" wg set "$device" listen-port $WG_PORT private-key "$4" peer "$5" allowed-ips "$6/32" endpoint "$7:$WG_PORT"
  in_pod "$pod" ip link set "$device" mtu $WG_MTU up
  in_pod "$pod" ip addr add "$3" peer "$6" dev "$device"
}

wireguard_up() {
  local end
  for end in c s; do (umask 077 && wg genkey >"$work/wg-$end"); done
  wireguard_end bank-client "wgc$$" $WG_CLIENT "$work/wg-c" "$(wg pubkey <"$work/wg-s")" $WG_SERVER "$BANK_SERVER_V4"
  wireguard_end bank-server "wgs$$" $WG_SERVER "$work/wg-s" "$(wg pubkey <"$work/wg-c")" $WG_CLIENT "$BANK_CLIENT_V4"
}

# ---- handshakes of the rekeying pair: answers (WireGuard type 2) on the link of shop-client2

count_rekeys() {
  ip netns exec "$NODE2_NS" nft -f - <<END
table netdev bench {
  counter rekeys { }
  chain out {
    type filter hook ingress device "$SHOP_CLIENT2_LINK" priority 1; policy accept;
    udp sport $TUNNEL_PORT udp dport $TUNNEL_PORT @th,64,32 0x02000000 counter name rekeys
  }
  chain in {
    type filter hook egress device "$SHOP_CLIENT2_LINK" priority 1; policy accept;
    udp sport $TUNNEL_PORT udp dport $TUNNEL_PORT @th,64,32 0x02000000 counter name rekeys
  }
}
END
}

rekeys() { ip netns exec "$NODE2_NS" nft list counter netdev bench rekeys | awk '$1 == "packets" { print $2 }'; }
