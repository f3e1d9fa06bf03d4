# shellcheck shell=bash
# The leak detector: nft counters on the node side of every project pod's link.
#
# A packet between two addresses of one project (workloads or VIPs) is a leak unless it is a tunnel
# datagram: UDP, both ports the tunnel port, payload opening with a WireGuard type word. Direction is
# the pod's: `out` leaves it (ingress of the node's end), `in` enters it (egress of the node's end).
# Classes, in the order of judgement:
#   fragment   any fragment (a tunnel datagram is never one)
#   vip        a VIP on either side
#   (tunnel)   a sealed datagram: counted, no leak
#   port       UDP on the tunnel port that is no sealed datagram
#   (quote)    an ICMP error that quotes a sealed datagram: counted, no leak
#   tcp udp icmp other
# Neighbour discovery (ICMPv6 133-137, hop limit 255) is not judged.
# Needs the netdev egress hook: Linux 5.16.

LEAK_TABLE=lab-leaks
LEAK_CLASSES=(fragment vip port tcp udp icmp other)
NO_LEAK_CLASSES=(tunnel quote)

project_set() {
  local project=$1 family=$2 pod elements
  if [[ $family == v4 ]]; then elements=${VIPS4[$project]}; else elements=${VIPS6[$project]}; fi
  for pod in "${PROJECT_PODS[@]}"; do
    [[ ${PROJECT_OF[$pod]} == "$project" ]] || continue
    if [[ $family == v4 ]]; then elements+=", ${V4[$pod]}"; else elements+=", ${V6[$pod]}"; fi
  done
  printf '%s' "$elements"
}

leak_sets() {
  local project
  for project in shop bank; do
    cat <<END
  set $project-v4 { type ipv4_addr; flags interval; elements = { $(project_set "$project" v4) }; }
  set $project-v6 { type ipv6_addr; flags interval; elements = { $(project_set "$project" v6) }; }
END
  done
  cat <<END
  set vips-v4 { type ipv4_addr; flags interval; elements = { $VIP_CIDR4 }; }
  set vips-v6 { type ipv6_addr; flags interval; elements = { $VIP_CIDR6 }; }
END
}

# judge PREFIX FAMILY: the rules that put a project packet into exactly one class.
judge() {
  local c=$1 fragment ip icmp words='{ 0x01000000, 0x02000000, 0x03000000, 0x04000000 }'
  # The quoted packet begins 8 bytes after the ICMP header; offsets below are bits from there.
  local quoted
  if [[ $2 == v4 ]]; then
    ip=ip icmp=icmp fragment='ip frag-off & 0x3fff != 0'
    quoted="icmp type { destination-unreachable, time-exceeded, parameter-problem } @th,64,8 0x45 @th,136,8 17"
    quoted+=" @th,224,16 $PORT @th,240,16 $PORT @th,288,32 $words"
  else
    ip=ip6 icmp=ipv6-icmp fragment='exthdr frag exists'
    quoted="icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem } @th,112,8 17"
    quoted+=" @th,384,16 $PORT @th,400,16 $PORT @th,448,32 $words"
    printf '    icmpv6 type { 133, 134, 135, 136, 137 } ip6 hoplimit 255 accept\n'
  fi
  cat <<END
    $fragment counter name $c-fragment accept
    $ip saddr @vips-$2 counter name $c-vip accept
    $ip daddr @vips-$2 counter name $c-vip accept
    udp sport $PORT udp dport $PORT @th,64,32 $words counter name $c-tunnel accept
    udp sport $PORT counter name $c-port accept
    udp dport $PORT counter name $c-port accept
    $quoted counter name $c-quote accept
    meta l4proto tcp counter name $c-tcp accept
    meta l4proto udp counter name $c-udp accept
    meta l4proto $icmp counter name $c-icmp accept
    counter name $c-other accept
END
}

leak_table() {
  local node=$1 pod family direction class project ip hook
  printf 'table netdev %s {\n' "$LEAK_TABLE"
  leak_sets
  for pod in "${PROJECT_PODS[@]}"; do
    [[ ${NODE_OF[$pod]} == "$node" ]] || continue
    for direction in out in; do
      for family in v4 v6; do
        for class in "${LEAK_CLASSES[@]}" "${NO_LEAK_CLASSES[@]}"; do
          printf '  counter %s_%s_%s-%s { }\n' "$pod" "$family" "$direction" "$class"
        done
        printf '  chain %s_%s_%s {\n' "$pod" "$family" "$direction"
        judge "${pod}_${family}_$direction" $family
        printf '  }\n'
      done
      if [[ $direction == out ]]; then hook=ingress; else hook=egress; fi
      printf '  chain %s_%s {\n    type filter hook %s device "p-%s" priority 0; policy accept;\n' \
        "$pod" $direction $hook "$pod"
      for project in shop bank; do
        for family in v4 v6; do
          if [[ $family == v4 ]]; then ip=ip; else ip=ip6; fi
          printf '    %s saddr @%s-%s %s daddr @%s-%s goto %s_%s_%s\n' \
            $ip $project $family $ip $project $family "$pod" $family $direction
        done
      done
      printf '  }\n'
    done
  done
  printf '}\n'
}

make_leak_detector() {
  local node jobs=() job
  for node in "${NODES[@]}"; do
    leak_table "$node" | inside "$node" nft -f - &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job" || die "the leak detector needs nft's netdev egress hook (Linux 5.16)"; done
}

# leak_counters [reset]: lines of POD FAMILY DIRECTION CLASS PACKETS, zeros included.
leak_counters() {
  local node
  for node in "${NODES[@]}"; do
    inside "$node" nft "${1:-list}" counters table netdev $LEAK_TABLE
  done | awk '$1 == "counter" { split($2, a, "_"); i = index(a[3], "-"); row = a[1] " " a[2] " " substr(a[3], 1, i - 1) " " substr(a[3], i + 1) }
    $1 == "packets" { print row, $2 }'
}

# leaks [--all]: non-zero rows, then `leaked N tunnel M`; status 1 when something leaked.
# --all also shows the classes that are no leaks.
leaks() {
  local all=0
  case ${1:-} in
    --reset) leak_counters reset >/dev/null; return ;;
    --all) all=1 ;;
    '') ;;
    *) die "leaks [--all | --reset]" ;;
  esac
  leak_counters | awk -v all=$all '
    $4 == "tunnel" { tunnel += $5 }
    $4 != "tunnel" && $4 != "quote" { leaked += $5 }
    $5 > 0 && (all || ($4 != "tunnel" && $4 != "quote")) {
      if (!header++) printf "%-14s%-8s%-11s%-10s%s\n", "POD", "FAMILY", "DIRECTION", "CLASS", "PACKETS"
      printf "%-14s%-8s%-11s%-10s%d\n", $1, $2, $3, $4, $5
    }
    END { printf "leaked %d tunnel %d\n", leaked, tunnel; exit leaked > 0 }'
}
