#!/usr/bin/env bash
# Goodput between two pods of the lab on two nodes: plain, wireguard-go, tencrypt, tencrypt with a rekey every 2 s.
#
#   bench/rekey-and-goodput.sh
#
# Interleaved rounds of iperf3 (TCP, one stream, IPv4, cubic), receiver's figures, median and spread. Then a numbered UDP
# stream at half the highest rate without loss, over 15 rekeys. Exit 1 unless tencrypt reaches wireguard-go's median, keeps
# 90 % of its own with rekeys, and the UDP stream loses nothing.
#
# Environment: ROUNDS (5), SECONDS_EACH (5), TENCRYPT (target/release/tencrypt). Needs root; takes about three minutes.
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)
rounds=${ROUNDS:-5} each=${SECONDS_EACH:-5}
((EUID == 0)) || { printf 'needs root (network namespaces): run it with sudo\n' >&2; exit 3; }
export TENC_LAB=bench$$ TENCRYPT=${TENCRYPT:-${CARGO_TARGET_DIR:-$root/target}/release/tencrypt}
lab=$root/netns-scripts/lab.sh
client=shop-client server=shop-web2 server_address=10.1.2.12

"$root/netns-scripts/deps.sh" wireguard-tools wireguard-go
work=$(mktemp -d)
finish() {
  wireguard_down 2>/dev/null || true
  "$lab" down
  rm -rf "$work"
}
trap finish EXIT
"$lab" up 2>/dev/null

in_pod() { local pod=$1; shift; "$lab" exec "$pod" -- "$@"; }

# The control socket's name is the interface's, and the host has one folder for all.
wireguard_up() {
  local pod i other key names=("wgb$$a" "wgb$$b") pods=("$client" "$server") addresses=(10.1.1.11 "$server_address")
  for i in 0 1; do wg genkey >"$work/key$i"; wg pubkey <"$work/key$i" >"$work/public$i"; done
  for i in 0 1; do
    pod=${pods[i]} other=$((1 - i)) key=$work/key$i
    in_pod "$pod" wireguard-go "${names[i]}" >/dev/null 2>&1
    in_pod "$pod" wg set "${names[i]}" listen-port 51900 private-key "$key" peer "$(<"$work/public$other")" \
      endpoint "${addresses[other]}:51900" allowed-ips "10.200.0.$((other + 1))/32"
    in_pod "$pod" ip link set "${names[i]}" mtu 1390 up
    in_pod "$pod" ip addr add "10.200.0.$((i + 1))/24" dev "${names[i]}"
  done
}

# Deleting the device ends wireguard-go.
wireguard_down() {
  in_pod "$client" ip link del "wgb$$a"
  in_pod "$server" ip link del "wgb$$b"
}

# goodput ADDRESS: the receiver's Mbit/s.
goodput() {
  in_pod "$client" iperf3 -c "$1" -p 5301 -t "$each" -O 1 -C cubic -J | jq '.end.sum_received.bits_per_second / 1e6 | floor'
}

protect() { TENC_LAUNCH_ARGS=$1 "$lab" protect "$client" "$server" >/dev/null; }

# median FILE, spread FILE: of one number a line.
median() { sort -n "$1" | awk '{ v[NR] = $1 } END { print NR % 2 ? v[(NR + 1) / 2] : int((v[NR / 2] + v[NR / 2 + 1]) / 2) }'; }
spread() { sort -n "$1" | sed -n '1p;$p' | paste -sd- -; }

for pod in "$client" "$server"; do
  in_pod "$pod" sysctl -qw net.ipv4.tcp_congestion_control=cubic
done

for ((round = 1; round <= rounds; round++)); do
  goodput $server_address >>"$work/plain"
  wireguard_up
  goodput 10.200.0.2 >>"$work/wireguard-go"
  wireguard_down
  protect ''
  goodput $server_address >>"$work/tencrypt"
  "$lab" unprotect
  protect '--rekey-after 2'
  goodput $server_address >>"$work/tencrypt, rekey 2 s"
  "$lab" unprotect
  printf 'round %d of %d\n' $round "$rounds" >&2
done

printf '%s, %d CPUs, Linux %s, pod MTU 1450, veth + vxlan, TCP IPv4 one stream, cubic, %d rounds of %d s\n' \
  "$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1)" "$(nproc)" "$(uname -r)" "$rounds" "$each"
printf '%-24s %14s %20s\n' PATH 'MEDIAN Mbit/s' SPREAD
for name in plain wireguard-go tencrypt 'tencrypt, rekey 2 s'; do
  printf '%-24s %14d %20s\n' "$name" "$(median "$work/$name")" "$(spread "$work/$name")"
done

# lost RATE SECONDS: datagrams of 1,200 bytes that a stream of RATE Mbit/s lost.
lost() {
  in_pod "$client" iperf3 -c "$server_address" -p 5301 -u -l 1200 -b "$1M" -t "$2" --pacing-timer 100 -J |
    jq '.end.sum | .lost_packets'
}
protect '--rekey-after 2'
rate=50
while ((rate < 1600)) && [[ $(lost $((rate * 2)) 2) == 0 ]]; do rate=$((rate * 2)); done
half=$((rate / 2))
gone=$(lost $half 32)
printf 'UDP: no loss up to %d Mbit/s; %d Mbit/s for 32 s with a rekey every 2 s: %s lost\n' "$rate" "$half" "$gone"
"$lab" unprotect

status=0
verdict() { if (($2)); then printf 'good    %s\n' "$1"; else printf 'MISSED  %s\n' "$1"; status=1; fi; }
ours=$(median "$work/tencrypt") theirs=$(median "$work/wireguard-go") rekeyed=$(median "$work/tencrypt, rekey 2 s")
verdict "at least wireguard-go's goodput: $ours of $theirs Mbit/s" $((ours >= theirs))
verdict "at least 90 % with rekeys: $rekeyed of $ours Mbit/s" $((rekeyed * 10 >= ours * 9))
verdict "a UDP stream over 15 rekeys loses nothing: $gone lost" $((gone == 0))
exit $status
