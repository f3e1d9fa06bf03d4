# shellcheck shell=bash
# Namespaces, links, addresses, routes, and what kube-proxy and the CNI do with nft.
#
#   ext ---- fabric (br0, 192.168.77.0/24, fd77::/64, MTU 1500)
#             |                        |
#           node1 ======= vxlan ===== node2          pods: MTU 1450
#            cni0 (bridge)             routed /32 and /128 links, gateway 169.254.1.1 / fe80::1
#            |  |  |  |                |   |   |   |
#            pods (p-<pod> <-> eth0)   pods (p-<pod> <-> eth0)

# sysctls NAME KEY=VALUE...: written in the namespace; a key that this kernel lacks is skipped.
sysctls() {
  local name=$1
  shift
  # shellcheck disable=SC2016  # expanded by the inner shell
  inside "$name" sh -c 'for kv; do f=/proc/sys/net/${kv%%=*}; [ ! -e "$f" ] || echo "${kv#*=}" >"$f"; done' sh "$@"
}

batch() { ip -n "$(ns "$1")" -batch -; }

make_namespaces() {
  local name
  for name in "${NAMESPACES[@]}"; do ip netns add "$(ns "$name")"; done
}

# Sysctls that interfaces inherit when they are made. Duplicate address detection only costs time here
# (and fails behind a hairpin bridge port, which reflects a pod's own packets).
preset_sysctls() {
  local name pod=() dad=(ipv6/conf/all/disable_ipv6=0 ipv6/conf/default/disable_ipv6=0
    ipv6/conf/all/accept_dad=0 ipv6/conf/default/accept_dad=0)
  local router=(ipv4/ip_forward=1 ipv6/conf/all/forwarding=1 ipv6/conf/default/forwarding=1
    ipv4/conf/all/rp_filter=0 ipv4/conf/default/rp_filter=0
    ipv4/conf/all/send_redirects=0 ipv4/conf/default/send_redirects=0)
  for name in fabric node1 node2; do sysctls "$name" "${dad[@]}" "${router[@]}"; done
  # As on a Kubernetes node: bridged packets pass the nft hooks, so a reply between two pods of one
  # bridge gets its VIP back.
  sysctls node1 bridge/bridge-nf-call-iptables=1 bridge/bridge-nf-call-ip6tables=1
  if [[ -n ${TENC_LAB_RP_FILTER:-} ]]; then
    pod=("ipv4/conf/all/rp_filter=$TENC_LAB_RP_FILTER" "ipv4/conf/default/rp_filter=$TENC_LAB_RP_FILTER")
  fi
  # Ports that agents take: no program of a pod gets one by chance before they do.
  pod+=(ipv4/ip_local_reserved_ports=51820,60999)
  sysctls ext "${dad[@]}"
  for name in "${PODS[@]}"; do sysctls "$name" "${dad[@]}" "${pod[@]}"; done
}

make_fabric() {
  batch fabric <<END
link set lo up
link add br0 address 02:00:00:77:00:fe type bridge stp_state 0 mcast_snooping 0
addr add 192.168.77.254/24 dev br0
addr add fd77::fe/64 dev br0 nodad
link set br0 up
link add node1 type veth peer name eth0 netns $(ns node1)
link add node2 type veth peer name eth0 netns $(ns node2)
link set node1 addrgenmode none master br0 up
link set node2 addrgenmode none master br0 up
link add ext type veth peer name eth0 netns $(ns ext)
addr add 203.0.113.1/24 dev ext
addr add 2001:db8:113::1/64 dev ext nodad
link set ext up
END
  batch ext <<END
link set lo up
addr add $EXT_V4/24 dev eth0
addr add $EXT_V6/64 dev eth0 nodad
link set eth0 up
route add default via 203.0.113.1
route add default via 2001:db8:113::1
END
}

# make_node NUMBER OTHER: uplink and the vxlan to the other node.
make_node() {
  batch "node$1" <<END
link set lo up
addr add $NODE_LOCAL_DNS/32 dev lo scope host
addr add $METADATA/32 dev lo scope host
addr add 192.168.77.$1/24 dev eth0
addr add fd77::$1/64 dev eth0 nodad
link set eth0 up
route add default via 192.168.77.254
route add default via fd77::fe
link add vxlan0 mtu 1450 type vxlan id 77 local 192.168.77.$1 remote 192.168.77.$2 dstport 4789 dev eth0
link set vxlan0 addrgenmode none
addr add 10.1.$1.0/32 dev vxlan0
addr add fe80::77:$1/64 dev vxlan0 nodad
link set vxlan0 up
route add 10.1.$2.0/24 via 10.1.$2.0 dev vxlan0 onlink
route add fd00:10:1:$2::/64 via fe80::77:$2 dev vxlan0
END
}

# The first node: a bridge, as the bridge CNI plug-in builds it.
make_bridge_pods() {
  local pod
  {
    cat <<END
link add cni0 address 02:00:00:01:01:01 mtu 1450 type bridge stp_state 0 mcast_snooping 0
addr add 10.1.1.1/24 dev cni0
addr add fd00:10:1:1::1/64 dev cni0 nodad
link set cni0 up
END
    for pod in "${PODS[@]}"; do
      [[ ${NODE_OF[$pod]} == node1 ]] || continue
      cat <<END
link add p-$pod mtu 1450 type veth peer name eth0 mtu 1450 netns $(ns "$pod")
link set p-$pod addrgenmode none master cni0 up
link set p-$pod type bridge_slave hairpin on
END
    done
  } | batch node1
  for pod in "${PODS[@]}"; do
    [[ ${NODE_OF[$pod]} == node1 ]] || continue
    batch "$pod" <<END
link set lo up
addr add ${V4[$pod]}/24 dev eth0
addr add ${V6[$pod]}/64 dev eth0 nodad
link set eth0 up
route add default via 10.1.1.1
route add default via fd00:10:1:1::1
END
  done
}

# The second node: one routed link per pod, as Calico builds it.
make_routed_pods() {
  local pod keys=()
  {
    printf 'route add blackhole 10.1.2.0/24\nroute add blackhole fd00:10:1:2::/64\n'
    for pod in "${PODS[@]}"; do
      [[ ${NODE_OF[$pod]} == node2 ]] || continue
      cat <<END
link add p-$pod mtu 1450 type veth peer name eth0 mtu 1450 netns $(ns "$pod")
link set p-$pod addrgenmode none
addr add fe80::1/64 dev p-$pod nodad
link set p-$pod up
route add ${V4[$pod]} dev p-$pod scope link
route add ${V6[$pod]} dev p-$pod
END
    done
  } | batch node2
  for pod in "${PODS[@]}"; do
    [[ ${NODE_OF[$pod]} == node2 ]] || continue
    keys+=("ipv4/conf/p-$pod/proxy_arp=1" "ipv4/neigh/p-$pod/proxy_delay=0")
    batch "$pod" <<END
link set lo up
addr add ${V4[$pod]}/32 dev eth0
addr add ${V6[$pod]}/128 dev eth0 nodad
link set eth0 up
route add 169.254.1.1 dev eth0 scope link
route add default via 169.254.1.1 dev eth0
route add default via fe80::1 dev eth0
END
  done
  sysctls node2 "${keys[@]}"
}

# One DNAT rule per endpoint, chosen at random like kube-proxy's.
service_rules() {
  local service pname proto port target pods pod left
  for service in "${SERVICES[@]}"; do
    [[ ${SERVICE_V4[$service]} != None ]] || continue
    IFS=, read -ra pods <<<"${SERVICE_PODS[$service]}"
    while read -r pname proto port target; do
      left=${#pods[@]}
      for pod in "${pods[@]}"; do
        cat <<END
    ip daddr ${SERVICE_V4[$service]} $proto dport $port numgen random mod $left == 0 dnat ip to ${V4[$pod]}:$target comment "$service:$pname"
    ip6 daddr ${SERVICE_V6[$service]} $proto dport $port numgen random mod $left == 0 dnat ip6 to [${V6[$pod]}]:$target comment "$service:$pname"
END
        left=$((left - 1))
      done
    done <<<"${SERVICE_PORTS[$service]}"
  done
  cat <<END
    ip daddr $SHOP_POOL4 tcp dport 80 numgen random mod 2 == 0 dnat ip to ${V4[shop-web1]}:8080
    ip daddr $SHOP_POOL4 tcp dport 80 dnat ip to ${V4[shop-web2]}:8080
    ip6 daddr $SHOP_POOL6 tcp dport 80 numgen random mod 2 == 0 dnat ip6 to [${V6[shop-web1]}]:8080
    ip6 daddr $SHOP_POOL6 tcp dport 80 dnat ip6 to [${V6[shop-web2]}]:8080
END
}

# portal_rules NODE: nodePorts, externalIPs, the load balancer's ingress address and hostPorts, as this node answers to them.
portal_rules() {
  local node=$1 pods left pod pname proto port target host=${V4[$HOST_PORT_POD]} host6=${V6[$HOST_PORT_POD]}
  IFS=, read -ra pods <<<"${SERVICE_PODS[$PORTAL]}"
  while read -r pname proto port target; do
    left=${#pods[@]}
    for pod in "${pods[@]}"; do
      cat <<END
    ip daddr { ${NODE_V4[$node]} } $proto dport ${NODE_PORT[$pname]} numgen random mod $left == 0 dnat ip to ${V4[$pod]}:$target
    ip6 daddr { ${NODE_V6[$node]} } $proto dport ${NODE_PORT[$pname]} numgen random mod $left == 0 dnat ip6 to [${V6[$pod]}]:$target
    ip daddr { $EXTERNAL_IP4, $INGRESS4 } $proto dport $port numgen random mod $left == 0 dnat ip to ${V4[$pod]}:$target
    ip6 daddr { $EXTERNAL_IP6, $INGRESS6 } $proto dport $port numgen random mod $left == 0 dnat ip6 to [${V6[$pod]}]:$target
END
      left=$((left - 1))
    done
    [[ ${NODE_OF[$HOST_PORT_POD]} == "$node" ]] || continue
    cat <<END
    ip daddr { ${NODE_V4[$node]} } $proto dport ${HOST_PORT[$pname]} dnat ip to $host:$target
    ip6 daddr { ${NODE_V6[$node]} } $proto dport ${HOST_PORT[$pname]} dnat ip6 to [$host6]:$target
END
  done <<<"${SERVICE_PORTS[$PORTAL]}"
}

# Masquerading as on a node: a pod that reaches itself through a VIP, node traffic to a VIP, and what
# leaves the cluster. Where the kernel has no bridge hooks, also VIP traffic between pods of one bridge.
masquerade_rules() {
  local pod
  for pod in "${PODS[@]}"; do
    printf '    ct status dnat ip saddr %s ip daddr %s masquerade\n' "${V4[$pod]}" "${V4[$pod]}"
    printf '    ct status dnat ip6 saddr %s ip6 daddr %s masquerade\n' "${V6[$pod]}" "${V6[$pod]}"
  done
  if ! inside node1 test -e /proc/sys/net/bridge/bridge-nf-call-iptables; then
    printf '    ct status dnat ip saddr 10.1.1.0/24 ip daddr 10.1.1.0/24 masquerade\n'
    printf '    ct status dnat ip6 saddr fd00:10:1:1::/64 ip6 daddr fd00:10:1:1::/64 masquerade\n'
  fi
  cat <<END
    ct status dnat ct original ip daddr != $VIP_CIDR4 masquerade
    ct status dnat ct original ip6 daddr != $VIP_CIDR6 masquerade
    ct status dnat ip saddr != $POD_CIDR4 masquerade
    ct status dnat ip6 saddr != $POD_CIDR6 masquerade
    ip saddr $POD_CIDR4 ip daddr != { $POD_CIDR4, 224.0.0.0/4, 255.255.255.255 } masquerade
    ip6 saddr $POD_CIDR6 ip6 daddr != { $POD_CIDR6, ff00::/8 } masquerade
END
}

# service_table NODE
service_table() {
  cat <<END
table inet lab-services {
  chain services {
$SERVICE_RULES
$(portal_rules "$1")
  }
  chain prerouting {
    type nat hook prerouting priority dstnat; policy accept;
    jump services
  }
  chain output {
    type nat hook output priority -100; policy accept;
    jump services
  }
  chain postrouting {
    type nat hook postrouting priority srcnat; policy accept;
$MASQUERADE_RULES
  }
  chain forward {
    type filter hook forward priority filter; policy accept;
    ip daddr $VIP_CIDR4 reject
    ip6 daddr $VIP_CIDR6 reject
  }
}
END
}

make_services() {
  local node
  SERVICE_RULES=$(service_rules) MASQUERADE_RULES=$(masquerade_rules)
  for node in "${NODES[@]}"; do service_table "$node" | inside "$node" nft -f -; done
}

make_topology() {
  make_namespaces
  preset_sysctls
  make_fabric
  make_node 1 2
  make_node 2 1
  make_bridge_pods
  make_routed_pods
  make_services
}
