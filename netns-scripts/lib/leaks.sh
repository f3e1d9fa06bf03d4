# shellcheck shell=bash
# The leak detector: what passes the node side of every project pod's link.
#
# It knows no address of a project. Every frame of a link, both directions, all ethertypes and tags, is a leak unless it is
# one of these (classes that are no leaks):
#   tunnel     a sealed datagram: no IP options, no fragment, UDP, both ports the tunnel port, a WireGuard type word, and
#              for types 1 to 3 the exact length
#   quote      an ICMP error that quotes a sealed datagram
#   neighbour  ARP of at most 60 bytes, neighbour discovery (hop limit 255), MLD (hop limit 1), IGMP (TTL 1)
#   dns        the agent's own DNS: port 53 of a resolver, and at the pod a port that applications do not get; fragments of
#              answers
#   declared   to or from an outside destination that the lab (DECLARED_TABLE) or a test (`--declare`) names
# The classes of leaks, in the order of judgement:
#   frame      neither ARP, IPv4 nor IPv6, or tagged (family `link`)
#   options    IPv4 options, IPv6 extension headers (fragments have their own)
#   fragment
#   port       UDP on the tunnel port that is no sealed datagram
#   tcp udp icmp other
# And, since the classes that are no leaks could carry something: every payload of the tests bears a canary. canary.py finds it in
# every frame that these classes let pass, sealed datagrams excepted unless `--deep on`, and declared destinations always.
#
# Direction is the pod's: `out` leaves it (ingress of the node's end), `in` enters it (egress of the node's end). What a bridge
# floods to a pod though it is for another one is not judged on the way in; it was on its way out.
# Judged are the pods that `lab.sh protect` protects, and those it was told to protect. Needs the netdev egress hook: Linux 5.16.

LEAK_TABLE=lab-leaks
LEAK_CLASSES=(options fragment port tcp udp icmp other)
NO_LEAK_CLASSES=(tunnel quote neighbour dns declared)
LEAK_NAMES='frame options fragment port tcp udp icmp other canary lost'

# Judged from the beginning.
JUDGED=(shop-client shop-web1 shop-client2 shop-web2)

# The ports of the agents' queries: above those that the kernel gives to applications.
agent_ports() {
  local low high
  read -r low high < <(inside shop-client cat /proc/sys/net/ipv4/ip_local_port_range)
  if ((high < 64511)); then printf '%d-65534' $((high + 1)); else printf '1024-%d' $((low - 1)); fi
}

# declaration ADDRESS PROTOCOL PORT: the command that declares a destination in a node's table. Port * is any.
declaration() {
  local address=$1 protocol=$2 port=$3 family=4
  [[ $address != *:* ]] || family=6
  [[ $protocol != icmp || $family == 4 ]] || protocol=ipv6-icmp
  if [[ $protocol == dns ]]; then
    printf 'add element netdev %s resolvers%s { %s }\n' "$LEAK_TABLE" $family "$address"
  elif [[ $port == '*' ]]; then
    printf 'add element netdev %s hosts%s { %s . %s }\n' "$LEAK_TABLE" $family "$address" "$protocol"
  else
    printf 'add element netdev %s ports%s { %s . %s . %s }\n' "$LEAK_TABLE" $family "$address" "$protocol" "$port"
  fi
}

# The default declarations, as the table in common.sh has them.
default_declarations() {
  local address protocol port
  while read -r address protocol port; do
    [[ -z $address ]] || declaration "$address" "$protocol" "$port"
  done <<<"$DECLARED_TABLE"
}

leak_sets() {
  local family type
  for family in 4 6; do
    type=ipv${family}_addr
    cat <<END
  set hosts$family { type $type . inet_proto; flags interval; }
  set ports$family { type $type . inet_proto . inet_service; }
  set resolvers$family { type $type; }
END
  done
}

# judge PREFIX FAMILY REMOTE LOCAL-PORT REMOTE-PORT: the rules that put an IP packet into exactly one class. REMOTE is saddr
# or daddr, the ports are sport or dport.
judge() {
  local c=$1 v=${2#v} remote=$3 local_port=$4 remote_port=$5 ip icmp word quoted tunnel
  local words='{ 0x01000000, 0x02000000, 0x03000000, 0x04000000 }'
  # The quoted packet begins 8 bytes after the ICMP header; offsets below are bits from there.
  if [[ $2 == v4 ]]; then
    ip=ip icmp=icmp tunnel="@nh,0,8 0x45 ip frag-off & 0x3fff == 0"
    quoted="icmp type { destination-unreachable, time-exceeded, parameter-problem } @th,64,8 0x45 @th,136,8 17"
    quoted+=" @th,224,16 $PORT @th,240,16 $PORT @th,288,32 $words"
  else
    ip=ip6 icmp=ipv6-icmp tunnel="@nh,48,8 17"
    quoted="@nh,48,8 58 icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem } @th,112,8 17"
    quoted+=" @th,384,16 $PORT @th,400,16 $PORT @th,448,32 $words"
  fi
  tunnel+=" udp sport $PORT udp dport $PORT"
  for word in '0x04000000 udp length >= 40' '0x01000000 udp length 156' '0x02000000 udp length 100' '0x03000000 udp length 72'; do
    printf '    %s @th,64,32 %s counter name %s-tunnel accept\n' "$tunnel" "$word" "$c"
  done
  if [[ $2 == v4 ]]; then
    cat <<END
    ip protocol igmp ip ttl 1 counter name $c-neighbour accept
    @nh,0,8 != 0x45 counter name $c-options accept
END
  else
    cat <<END
    @nh,48,8 58 icmpv6 type 133-137 ip6 hoplimit 255 counter name $c-neighbour accept
    @nh,48,8 0 icmpv6 type { 130, 131, 132, 143 } ip6 hoplimit 1 counter name $c-neighbour accept
    @nh,48,8 { 0, 43, 60, 135 } counter name $c-options accept
END
  fi
  cat <<END
    $quoted counter name $c-quote accept
    $ip $remote . meta l4proto @hosts$v counter name $c-declared accept
END
  # A large answer comes in fragments, of which the first shows ports.
  if [[ $2 == v4 ]]; then
    [[ $remote == daddr ]] || printf '    ip frag-off & 0x3fff != 0 ip protocol udp ip saddr @resolvers4 counter name %s-dns accept\n' "$c"
    printf '    ip frag-off & 0x3fff != 0 counter name %s-fragment accept\n' "$c"
  else
    [[ $remote == daddr ]] || printf '    @nh,48,8 44 meta l4proto udp ip6 saddr @resolvers6 counter name %s-dns accept\n' "$c"
    printf '    @nh,48,8 44 counter name %s-fragment accept\n' "$c"
  fi
  cat <<END
    meta l4proto { tcp, udp } $ip $remote . meta l4proto . th sport @ports$v counter name $c-declared accept
    meta l4proto { tcp, udp } $ip $remote . meta l4proto . th dport @ports$v counter name $c-declared accept
    meta l4proto { tcp, udp } $ip $remote @resolvers$v th $remote_port 53 th $local_port $AGENT_PORTS counter name $c-dns accept
    udp sport $PORT counter name $c-port accept
    udp dport $PORT counter name $c-port accept
    meta l4proto tcp counter name $c-tcp accept
    meta l4proto udp counter name $c-udp accept
    meta l4proto $icmp counter name $c-icmp accept
    counter name $c-other accept
END
}

# link_chains POD DIRECTION: what one direction of a link is judged by.
link_chains() {
  local pod=$1 direction=$2 family class hook=ingress mac arp=46
  for family in v4 v6; do
    for class in "${LEAK_CLASSES[@]}" "${NO_LEAK_CLASSES[@]}"; do
      printf '  counter %s_%s_%s-%s { }\n' "$pod" $family "$direction" "$class"
    done
    printf '  chain %s_%s_%s {\n' "$pod" $family "$direction"
    if [[ $direction == out ]]; then
      judge "${pod}_${family}_out" $family daddr sport dport
    else
      judge "${pod}_${family}_in" $family saddr dport sport
    fi
    printf '  }\n'
  done
  # At egress the length includes the 14 bytes of the Ethernet header.
  [[ $direction == out ]] || hook=egress arp=60
  printf '  counter %s_link_%s-frame { }\n  counter %s_link_%s-neighbour { }\n' "$pod" "$direction" "$pod" "$direction"
  printf '  chain %s_%s {\n    type filter hook %s device "p-%s" priority 0; policy accept;\n' \
    "$pod" "$direction" $hook "$pod"
  if [[ $direction == in ]]; then
    mac=$(ip -n "$(ns "$pod")" -o link show eth0 | grep -o 'link/ether [^ ]*')
    mac=${mac#* }
    printf '    ether daddr & 01:00:00:00:00:00 == 00:00:00:00:00:00 ether daddr != %s accept\n' "$mac"
  fi
  # The frame's own type: a tag stands there too, also one that the kernel has taken off already.
  cat <<END
    @ll,96,16 0x0800 goto ${pod}_v4_$direction
    @ll,96,16 0x86dd goto ${pod}_v6_$direction
    @ll,96,16 0x0806 meta length <= $arp counter name ${pod}_link_$direction-neighbour accept
    counter name ${pod}_link_$direction-frame accept
  }
END
}

leak_table() {
  local node=$1 pod direction
  printf 'table netdev %s {\n' "$LEAK_TABLE"
  leak_sets
  for pod in "${PROJECT_PODS[@]}"; do
    [[ ${NODE_OF[$pod]} == "$node" ]] || continue
    for direction in out in; do link_chains "$pod" $direction; done
  done
  printf '}\n'
  default_declarations
}

# The frames that canary.py reads: those that the classes above let pass.
canary_filter() {
  # shellcheck disable=SC2140  # one expression
  tcpdump -ddd -y EN10MB "not (ip or ip6) or icmp or icmp6 or igmp or (ip6 and ip6[6] = 0) or port 53"
}

make_leak_detector() {
  local node jobs=() job
  AGENT_PORTS=$(agent_ports)
  printf '%s\n' "${JUDGED[@]}" >"$RUN/judged"
  mkdir "$RUN/canary"
  canary_filter >"$RUN/canary/filter" || die "tcpdump could not make the filter of the leak detector"
  for node in "${NODES[@]}"; do
    leak_table "$node" | inside "$node" nft -f - &
    jobs+=($!)
    mkfifo "$RUN/canary/$node"
    spawn "canary-$node" "$node" "$PYTHON" -I "$SCRIPTS/canary.py" "$RUN/canary/$node" "$RUN/canary/filter"
  done
  for job in "${jobs[@]}"; do wait "$job" || die "the leak detector needs nft's netdev egress hook (Linux 5.16)"; done
  tell_canary "$(awk 'NF && $2 != "dns" { print "declare", $1, $2 }' <<<"$DECLARED_TABLE")"
}

# tell_canary COMMANDS: orders for canary.py on every node; returns when they are carried out. Its answers, if any, come out.
tell_canary() {
  local node answer tries
  for node in "${NODES[@]}"; do
    alive "canary-$node" >/dev/null || die "the canary's sniffer of $node has ended (see $RUN/log/canary-$node.log)"
    answer=$RUN/canary/$node.$BASHPID
    printf '%s\nanswer %s\n' "$1" "$answer" >"$RUN/canary/$node"
    tries=2000
    until [[ -e $answer ]]; do
      ((tries-- > 0)) || die "the canary's sniffer of $node does not answer"
      sleep 0.005
    done
    cat "$answer"
    rm -f "$answer"
  done
}

# leak_counters [reset]: lines of POD FAMILY DIRECTION CLASS PACKETS, zeros included; then what canary.py counted.
leak_counters() {
  local node
  for node in "${NODES[@]}"; do
    inside "$node" nft "${1:-list}" counters table netdev $LEAK_TABLE
  done | awk '$1 == "counter" { split($2, a, "_"); i = index(a[3], "-"); row = a[1] " " a[2] " " substr(a[3], 1, i - 1) " " substr(a[3], i + 1) }
    $1 == "packets" { print row, $2 }'
  tell_canary "${1:-counts}"
}

# declare_outside ADDRESS/PROTOCOL[/PORT]...: further outside destinations, until `--undeclare`. PORT is the port of either end;
# without it all of the protocol, and then ADDRESS may be a range, FIRST-LAST. PROTOCOL dns: a resolver.
declare_outside() {
  local what address protocol port node commands='' orders=''
  for what; do
    IFS=/ read -r address protocol port <<<"$what"
    [[ -n $protocol ]] || die "--declare ADDRESS/PROTOCOL[/PORT]: '$what'"
    commands+=$(declaration "$address" "$protocol" "${port:-*}")$'\n'
    [[ $protocol == dns || $address == *-* ]] || orders+=${orders:+$'\n'}"declare $address $protocol"
  done
  for node in "${NODES[@]}"; do inside "$node" nft -f - <<<"$commands"; done
  [[ -z $orders ]] || tell_canary "$orders"
}

# Only what the lab itself declares; judged are the usual pods, and those that `lab.sh protect` protects.
undeclare() {
  local set node commands='' pod
  for pod in "${PROJECT_PODS[@]}"; do
    [[ " ${JUDGED[*]} " != *" $pod "* && ! -e $RUN/pids/launch-$pod ]] || printf '%s\n' "$pod"
  done >"$RUN/judged"
  for set in hosts ports resolvers; do
    commands+="flush set netdev $LEAK_TABLE ${set}4; flush set netdev $LEAK_TABLE ${set}6"$'\n'
  done
  commands+=$(default_declarations)
  for node in "${NODES[@]}"; do inside "$node" nft -f - <<<"$commands"; done
  tell_canary "undeclare"$'\n'"$(awk 'NF && $2 != "dns" { print "declare", $1, $2 }' <<<"$DECLARED_TABLE")"
}

# leaks [--all]: non-zero rows, then `leaked N tunnel M`; status 1 when something leaked.
# --all also shows the classes that are no leaks, and the pods that are not judged.
leaks() {
  local all=0
  case ${1:-} in
    --reset) leak_counters reset >/dev/null; return ;;
    --declare) shift; declare_outside "$@"; return ;;
    --undeclare) undeclare; return ;;
    --deep) tell_canary "deep ${2:-on}"; return ;;
    --judge) shift; printf '%s\n' "$@" >>"$RUN/judged"; return ;;
    --all) all=1 ;;
    '') ;;
    *) die "leaks [--all | --reset | --declare ADDRESS/PROTOCOL[/PORT]... | --undeclare | --deep on|off | --judge POD...]" ;;
  esac
  leak_counters | awk -v all=$all -v names="$LEAK_NAMES" '
    BEGIN { split(names, list, " "); for (i in list) leak[list[i]] = 1; judged["detector"] = 1 }
    FILENAME != "-" { judged[$1] = 1; next }
    !all && !($1 in judged) { next }
    $4 == "tunnel" { tunnel += $5 }
    $4 in leak && $1 in judged { leaked += $5 }
    $5 > 0 && (all || $4 in leak) {
      if (!header++) printf "%-14s%-8s%-11s%-10s%s\n", "POD", "FAMILY", "DIRECTION", "CLASS", "PACKETS"
      printf "%-14s%-8s%-11s%-10s%d\n", $1, $2, $3, $4, $5
    }
    END { printf "leaked %d tunnel %d\n", leaked, tunnel; exit leaked > 0 }' "$RUN/judged" -
}
