"""What people would use instead: packet tunnels with a device of their own, and TCP proxies.

Every tunnel's device has the MTU that Tencrypt's routes have on the same link, so that segments are equal.
"""

import os

import shell
from rows import IPERF, PONG, Row
from shell import inside, run, until
from underlay import V4, ip

TUNNEL = {"a": "10.200.77.1", "b": "10.200.77.2"}
OTHER = {"a": "b", "b": "a"}
# Outer IPv4, UDP, WireGuard's header and tag.
OVERHEAD = 60
WG_SOCKETS = "/var/run/wireguard"
PORT = 51900


class Device(Row):
    """A tunnel with a device at each end."""

    address = TUNNEL["b"]
    overhead = OVERHEAD

    def device(self, end):
        return f"bn{end}{os.getpid()}"

    def mtu(self):
        return (self.place.underlay.mtu - self.overhead) // 16 * 16

    def address_device(self, end):
        space, device = self.space(end), self.device(end)
        until(lambda: self._there(end), f"device of {self.title}")
        ip(space, f"link set {device} mtu {self.mtu()} up")
        run(*inside(space, "ip", "addr", "replace", TUNNEL[end], "dev", device))
        ip(space, f"route replace {TUNNEL[OTHER[end]]} dev {device} src {TUNNEL[end]} congctl cubic")

    def _there(self, end):
        self.alive()
        return self.device(end) in shell.run("ip", "-n", self.space(end), "-br", "link")


class WireGuard(Device):
    """One of WireGuard's implementations in user space, set up over its socket."""

    arguments = ()

    def socket(self, end):
        return f"{WG_SOCKETS}/{self.device(end)}.sock"

    def start(self):
        os.makedirs(WG_SOCKETS, exist_ok=True)
        keys = {}
        for end in "ab":
            private = run("wg", "genkey")
            keys[end] = self.write(f"key-{end}", private), run("wg", "pubkey", stdin=private).strip()
            self.spawn(end, self.program, *self.arguments, self.device(end),
                       env={"LOG_LEVEL": "error", "WG_LOG_LEVEL": "error", "WG_SUDO": "1"})
        for end in "ab":
            until(lambda end=end: self._listens(end), f"socket of {self.title}")
            run(*inside(self.space(end), "wg", "set", self.device(end), "listen-port", PORT, "private-key", keys[end][0],
                        "peer", keys[OTHER[end]][1], "allowed-ips", TUNNEL[OTHER[end]] + "/32",
                        "endpoint", f"{V4[OTHER[end]]}:{PORT}"))
            self.address_device(end)

    def _listens(self, end):
        self.alive()
        return os.path.exists(self.socket(end))

    def down(self):
        super().down()
        for end in "ab":
            if os.path.exists(self.socket(end)):
                os.unlink(self.socket(end))


class WireguardGo(WireGuard):
    name, title = "wireguard-go", "wireguard-go"
    arguments = ("--foreground",)


class Gotatun(WireGuard):
    name, title = "gotatun", "gotatun"
    arguments = ("--foreground", "--disable-drop-privileges")


class Boringtun(WireGuard):
    name, title = "boringtun", "boringtun"
    arguments = ("--foreground", "--disable-drop-privileges")


class Nebula(Device):
    """AES-256-GCM, its default."""

    name, title = "nebula", "nebula (AES-256-GCM)"

    def start(self):
        cert = self.program + "-cert"
        folder = self.file("pki")
        os.makedirs(folder, exist_ok=True)
        if not os.path.exists(f"{folder}/ca.key"):
            run(cert, "ca", "-name", "bench", cwd=folder)
            for end in "ab":
                run(cert, "sign", "-name", end, "-ip", TUNNEL[end] + "/24", cwd=folder)
        for end in "ab":
            other = OTHER[end]
            config = self.write(f"{end}.yml", f"""
pki: {{ca: {folder}/ca.crt, cert: {folder}/{end}.crt, key: {folder}/{end}.key}}
static_host_map: {{"{TUNNEL[other]}": ["{V4[other]}:{PORT}"]}}
lighthouse: {{am_lighthouse: false, interval: 60, hosts: []}}
listen: {{host: 0.0.0.0, port: {PORT}}}
punchy: {{punch: false}}
cipher: aes
tun: {{dev: {self.device(end)}, mtu: {self.mtu()}, tx_queue: 500}}
logging: {{level: warning, format: text}}
firewall:
  outbound: [{{port: any, proto: any, host: any}}]
  inbound: [{{port: any, proto: any, host: any}}]
""")
            self.spawn(end, self.program, "-config", config)
        for end in "ab":
            self.address_device(end)


class Tinc(Device):
    """tinc 1.0: Blowfish and SHA-1 are its defaults; here AES-256-CBC and SHA-256, which its manual offers."""

    name, title = "tinc", "tinc (AES-256-CBC, SHA-256)"
    # tinc finds its own path MTU; padding and digest need more room than WireGuard's.
    overhead = 100

    def start(self):
        folder = self.file("net")
        fresh = not os.path.isdir(folder)
        for end in "ab":
            home = f"{folder}/{end}"
            os.makedirs(f"{home}/hosts", exist_ok=True)
            with open(f"{home}/tinc.conf", "w", encoding="utf-8") as conf:
                conf.write(f"Name = {end}\nInterface = {self.device(end)}\nDeviceType = tun\nMode = router\n"
                           f"Port = {PORT}\nAddressFamily = ipv4\n" + ("ConnectTo = b\n" if end == "a" else ""))
            if fresh:
                with open(f"{home}/hosts/{end}", "w", encoding="utf-8") as host:
                    host.write(f"Address = {V4[end]} {PORT}\nSubnet = {TUNNEL[end]}/32\nPort = {PORT}\n"
                               "Cipher = aes-256-cbc\nDigest = sha256\n")
                run(self.program, "-c", home, "-K2048", limit=60)
        for end in "ab":
            other = OTHER[end]
            with open(f"{folder}/{other}/hosts/{other}", encoding="utf-8") as host:
                text = host.read()
            with open(f"{folder}/{end}/hosts/{other}", "w", encoding="utf-8") as host:
                host.write(text)
        # The one that is connected to starts first: the other tries at once, then only after five seconds.
        for end in "ba":
            self.spawn(end, self.program, "-c", f"{folder}/{end}", "-D", f"--pidfile={folder}/{end}/pid")
            self.address_device(end)


class Proxy(Row):
    """A TCP proxy: clients connect to its listener in a, servers see a connection from b's own loopback."""

    measures = {"tcp"}
    address = "127.0.0.1"
    # Port of the proxy between the ends, by listener.
    between = {IPERF: 8301, PONG: 8302}


class Stunnel(Proxy):
    """TLS 1.3, AES-256-GCM."""

    name, title = "stunnel", "stunnel (TCP proxy)"

    def start(self):
        cert = self.file("cert.pem")
        if not os.path.exists(cert):
            run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", 2, "-subj", "/CN=bench",
                "-keyout", cert, "-out", self.file("crt.pem"), limit=60)
            with open(cert, "a", encoding="utf-8") as both, open(self.file("crt.pem"), encoding="utf-8") as crt:
                both.write(crt.read())
            os.chmod(cert, 0o600)
        common = ("foreground = yes\npid =\ndebug = err\nsyslog = no\nsslVersion = TLSv1.3\nciphersuites = TLS_AES_256_GCM_SHA384\n"
                  "socket = l:TCP_NODELAY=1\nsocket = r:TCP_NODELAY=1\n")
        server, client = common + f"cert = {cert}\n", common + "client = yes\n"
        for port, between in self.between.items():
            server += f"[s{port}]\naccept = {V4['b']}:{between}\nconnect = 127.0.0.1:{port}\n"
            client += f"[c{port}]\naccept = 127.0.0.1:{port}\nconnect = {V4['b']}:{between}\n" \
                      f"verifyPeer = yes\nCAfile = {self.file('crt.pem')}\n"
        self.spawn("b", self.program, self.write("b.conf", server))
        self.spawn("a", self.program, self.write("a.conf", client))


class Shadowsocks(Proxy):
    """shadowsocks-rust, AES-256-GCM."""

    name, title = "shadowsocks-rust", "shadowsocks-rust (AES-256-GCM, TCP proxy)"

    def start(self):
        common = ("-k", "bench-bench-bench", "-m", "aes-256-gcm", "--tcp-no-delay")
        self.spawn("b", os.path.join(os.path.dirname(self.program), "ssserver"), "-s", f"{V4['b']}:8388", *common)
        for port in self.between:
            self.spawn("a", self.program, "-b", f"127.0.0.1:{port}", "-s", f"{V4['b']}:8388", "--protocol", "tunnel",
                       "-f", f"127.0.0.1:{port}", *common)


def classes():
    """All of them, by name, in the order of the tables."""
    return {row.name: row for row in (WireguardGo, Gotatun, Boringtun, Nebula, Tinc, Stunnel, Shadowsocks)}

