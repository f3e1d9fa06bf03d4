# shellcheck shell=bash
# The programs of the lab: cluster DNS (dnsmasq), web servers, UDP echo, iperf3; and what they serve.

# Hosts lines: every address of a name, the reverse name being the first name of a line.
dns_hosts() {
  local service name pods pod address
  for service in "${SERVICES[@]}"; do
    name=${service#*/}.${service%/*}.svc.$ZONE
    if [[ ${SERVICE_V4[$service]} != None ]]; then
      printf '%s %s\n' "${SERVICE_V4[$service]}" "$name" "${SERVICE_V6[$service]}" "$name"
      continue
    fi
    IFS=, read -ra pods <<<"${SERVICE_PODS[$service]}"
    for pod in "${pods[@]}"; do
      # The name of an endpoint: 10.1.1.12 is 10-1-1-12.
      for address in "${V4[$pod]}" "${V6[$pod]}"; do
        printf '%s %s.%s %s\n' "$address" "${address//[.:]/-}" "$name" "$name"
      done
    done
  done
  printf '%s %s\n' "$EXT_V4" "$EXT_NAME" "$EXT_V6" "$EXT_NAME"
}

# Every name answers alike each time: no round robin, fixed TTLs. Whatever is not listed does not exist.
# `dns_config interface=NAME` or `dns_config listen-address=ADDRESS`.
dns_config() {
  local service name pname proto port i text
  cat <<END
user=root
group=root
no-resolv
no-hosts
no-poll
bind-interfaces
$1
local=/#/
no-round-robin
local-ttl=5
edns-packet-max=4096
cache-size=10000
addn-hosts=$RUN/dns/hosts
hostsdir=$RUN/dns/hosts.d
txt-record=dns-version.$ZONE,1.1.0
txt-record=note.shop.svc.$ZONE,ledgers are sealed,twice
dns-rr=strange.shop.svc.$ZONE,65280,0a1b2c3d4e5f
cname=ext.shop.svc.$ZONE,$EXT_NAME
END
  # One SRV record per port: dnsmasq would rotate several.
  for service in "${SERVICES[@]}"; do
    name=${service#*/}.${service%/*}.svc.$ZONE
    while read -r pname proto port _; do
      printf 'srv-host=_%s._%s.%s,%s,%d,0,100\n' "$pname" "$proto" "$name" "$name" "$port"
    done <<<"${SERVICE_PORTS[$service]}"
  done
  # Twelve records of 250 bytes: a 3 KB answer.
  for i in {a..l}; do
    printf -v text '%250s' ''
    printf 'txt-record=big.shop.svc.%s,%s\n' "$ZONE" "${text// /$i}"
  done
}

make_dns() {
  local node
  mkdir -p "$RUN/dns/hosts.d"
  dns_hosts >"$RUN/dns/hosts"
  dns_config $'interface=eth0\nexcept-interface=lo' >"$RUN/dns/dnsmasq.conf"
  spawn dns kube-dns "$(command -v dnsmasq)" --keep-in-foreground --conf-file="$RUN/dns/dnsmasq.conf" --pid-file
  # A copy on every node, as NodeLocal DNSCache.
  dns_config "listen-address=$NODE_LOCAL_DNS" >"$RUN/dns/node-local.conf"
  for node in "${NODES[@]}"; do
    spawn "dns-$node" "$node" "$(command -v dnsmasq)" --keep-in-foreground --conf-file="$RUN/dns/node-local.conf" --pid-file
  done
}

# Files that `ip netns exec` binds over /etc: names come from the cluster's resolver and nowhere else.
make_etc() {
  local pod dir search
  for pod in "${PODS[@]}"; do
    dir=/etc/netns/$(ns "$pod")
    # Another lab's `down` may remove the empty /etc/netns in between.
    mkdir -p "$dir" || mkdir -p "$dir"
    search="${PROJECT_OF[$pod]}.svc.$ZONE svc.$ZONE $ZONE"
    printf 'nameserver 10.96.0.10\nsearch %s\noptions ndots:5\n' "$search" >"$dir/resolv.conf"
    [[ ! -e /etc/hosts ]] || printf '127.0.0.1 localhost\n::1 localhost\n%s %s\n' "${V4[$pod]}" "$pod" >"$dir/hosts"
    [[ ! -e /etc/nsswitch.conf ]] || printf 'passwd: files\ngroup: files\nhosts: files dns\n' >"$dir/nsswitch.conf"
  done
}

BIG_BYTES=104857600

# The large file is one file under all web roots; its making overlaps with the rest of `up`.
make_big_file() {
  head -c $BIG_BYTES /dev/urandom >"$RUN/www/big" && sha256sum <"$RUN/www/big" | cut -d' ' -f1 >"$RUN/www/big.sha256"
}

WEB_SERVERS=(shop-web1 shop-web2 bank-server ext metadata)

make_web_roots() {
  local name
  mkdir -p "$RUN/www"
  CANARY=TENCRYPT-CANARY-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
  for name in "${WEB_SERVERS[@]}"; do
    mkdir "$RUN/www/$name"
    printf 'hello from %s\n' "$name" >"$RUN/www/$name/index.html"
    printf '%s\n' "$CANARY" >"$RUN/www/$name/canary"
    ln -s ../big "$RUN/www/$name/big"
  done
}

# listening NAME PROTOCOL-FLAG PORT...: whether sockets are bound there.
listening() {
  local name=$1 flag=$2 bound port
  shift 2
  bound=$(inside "$name" ss -Hnl "$flag")
  for port; do grep -q "[]*0-9]:$port " <<<"$bound" || return 1; done
}

start_daemons() {
  local name
  make_dns
  for name in shop-web1 shop-web2 bank-server; do
    spawn "web-$name" "$name" "$PYTHON" -I "$SCRIPTS/pod.py" http 8080 "$RUN/www/$name"
  done
  for name in "${NODES[@]}"; do
    spawn "web-$name" "$name" "$PYTHON" -I "$SCRIPTS/pod.py" http 80 "$RUN/www/metadata" "::ffff:$METADATA"
  done
  spawn web-ext ext "$PYTHON" -I "$SCRIPTS/pod.py" http 80 "$RUN/www/ext"
  for name in shop-web1 shop-web2; do
    spawn "echo-$name" "$name" "$PYTHON" -I "$SCRIPTS/pod.py" echo 7007
  done
  spawn iperf-shop-web2 shop-web2 iperf3 --server --port 5301 --forceflush
}

wait_for_daemons() {
  local name
  wait_for 10 "dnsmasq (see $RUN/log/dns.log)" listening kube-dns -u 53
  for name in "${NODES[@]}"; do
    wait_for 10 "dnsmasq of $name (see $RUN/log/dns-$name.log)" listening "$name" -u 53
    wait_for 10 "metadata server of $name" listening "$name" -t 80
  done
  wait_for 10 "web server of shop-web1" listening shop-web1 -t 8080
  wait_for 10 "web server of shop-web2, iperf3" listening shop-web2 -t 8080 5301
  wait_for 10 "web server of bank-server" listening bank-server -t 8080
  wait_for 10 "web server of ext" listening ext -t 80
  wait_for 10 "echo of shop-web1" listening shop-web1 -u 7007
  wait_for 10 "echo of shop-web2" listening shop-web2 -u 7007
}
