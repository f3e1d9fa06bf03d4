"""The peers' programs: from Debian's packages, from its backports, from Go modules and crates; and why one is not to be had.

Runs as the user who started the benchmark. Packages go through `netns-scripts/deps.sh`; what is newer in backports is
unpacked, and what has to be compiled is built, into the cache folder: neither the system nor apt's configuration changes.
"""

import os
import shutil
import subprocess

import shell
from shell import Failure, run

REPO = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "tencrypt-bench")
BUILD_LIMIT = 3600.0
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

# How each is installed: Debian packages, whether the first is taken from backports where that is newer, a Go module (where
# there is a Go; else the package, if one is named) or a crate, with version and what to build; the program.
PEERS = {
    "wireguard-go": {"packages": ["wireguard-go", "wireguard-tools"], "backport": True, "program": "wireguard-go"},
    "wireguard-go-module": {"packages": [], "program": "wireguard", "module": (
        "golang.zx2c4.com/wireguard", "v0.0.0-20260522210424-ecfc5a8d5446", [""])},
    "nebula": {"packages": ["nebula"], "program": "nebula", "module": (
        "github.com/slackhq/nebula", "v1.10.3", ["cmd/nebula", "cmd/nebula-cert"])},
    "tinc": {"packages": ["tinc"], "program": "tincd"},
    "stunnel": {"packages": ["stunnel4", "openssl"], "program": "stunnel4"},
    "boringtun": {"packages": ["wireguard-tools"], "crate": ("boringtun-cli", "0.7.1", []), "program": "boringtun-cli"},
    "gotatun": {"packages": ["wireguard-tools"], "crate": ("gotatun-cli", "0.10.2", []), "program": "gotatun"},
    "shadowsocks-rust": {"packages": [], "program": "sslocal", "crate": (
        "shadowsocks-rust", "1.25.0", ["--no-default-features", "--features", "basic,local-tunnel"])},
}


def install(name, say):
    """One peer: its program and version, or the reason why there is none."""
    how = PEERS[name]
    override = os.environ.get(name.upper().replace("-", "_"))
    try:
        found = None
        if "module" in how and not override:
            found = module(how, say)
            if not found and not how["packages"]:
                raise Failure("its module cannot be had, and there is no package")
            if not found:
                say(f"{name}: the older package is taken")
        if not found and how["packages"]:
            packages(how["packages"])
        if override:
            return {"program": os.path.abspath(override), "version": f"given as {override}"}
        if "crate" in how:
            found = crate(how, say)
        elif how.get("backport"):
            found = backport(how, say)
        if found:
            return found
        program = shutil.which(how["program"], path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if not program:
            raise Failure(f"its package has no program {how['program']}")
        version = run("dpkg-query", "-W", "-f", "${Version}", how["packages"][0])
        return {"program": program, "version": f"Debian package {version}"}
    except Failure as failure:
        say(f"{name}: {failure}")
        return {"reason": f"not installed: {failure}"}


def packages(names):
    run(os.path.join(REPO, "netns-scripts", "deps.sh"), *names, limit=600)


def codename():
    for line in shell.read("/etc/os-release").splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip('"')
    return ""


def backport(how, say):
    """The package of this name in backports, unpacked; None where there is none or no way to it."""
    name, suite = how["packages"][0], codename()
    if not suite or not os.path.exists(KEYRING):
        return None
    folder = os.path.join(CACHE, f"{name}-{suite}-backports")
    program = os.path.join(folder, "usr/bin", how["program"])
    if not os.path.exists(program):
        shutil.rmtree(folder, ignore_errors=True)
        for sub in ("apt/lists/partial", "apt/cache/archives/partial"):
            os.makedirs(os.path.join(folder, sub))
        apt = os.path.join(folder, "apt")
        with open(f"{apt}/sources.list", "w", encoding="utf-8") as sources:
            sources.write(f"deb [signed-by={KEYRING}] http://deb.debian.org/debian {suite}-backports main\n")
        get = ["apt-get", "-qq", "-o", f"Dir::Etc::sourcelist={apt}/sources.list", "-o", "Dir::Etc::sourceparts=/dev/null",
               "-o", f"Dir::State::lists={apt}/lists", "-o", f"Dir::Cache={apt}/cache", "-o", "APT::Sandbox::User=root",
               "-o", "Acquire::http::Timeout=20", "-o", "Acquire::Retries=1"]
        try:
            run(*get, "update", limit=300)
            run(*get, "download", name, limit=300, cwd=folder)
            file = next(f for f in os.listdir(folder) if f.endswith(".deb"))
            run("dpkg", "-x", file, ".", cwd=folder)
            version = run("dpkg-deb", "-f", file, "Version", cwd=folder).strip()
            os.unlink(os.path.join(folder, file))
            with open(os.path.join(folder, "version"), "w", encoding="utf-8") as file:
                file.write(f"Debian {suite}-backports {version}")
        except (Failure, StopIteration) as failure:
            say(f"{name}: nothing from {suite}-backports ({failure}): the older package is taken")
            shutil.rmtree(folder, ignore_errors=True)
            return None
        shutil.rmtree(apt, ignore_errors=True)
    return {"program": program, "version": shell.read(os.path.join(folder, "version"))}


def module(how, say):
    """A Go program; None where there is no Go, or it cannot be built."""
    name, version, commands = how["module"]
    folder = os.path.join(CACHE, f"{how['program']}-{version}")
    program = os.path.join(folder, how["program"])
    if not os.path.exists(program):
        go = shutil.which("go", path=os.environ.get("PATH", "") + ":/usr/local/go/bin")
        if not go:
            say(f"{how['program']}: no Go to build {version} with")
            return None
        say(f"{how['program']} {version}: go install, which takes minutes ...")
        os.makedirs(folder, exist_ok=True)
        # In this order the program itself comes last: it is there when everything is.
        for command in reversed(commands):
            try:
                compile_it([go, "install", f"{name}/{command}".rstrip("/") + f"@{version}"], folder, {"GOBIN": folder, "CGO_ENABLED": "0"})
            except Failure as failure:
                say(f"{how['program']}: {failure}")
                return None
    return {"program": program, "version": f"module {name} {version}"}


def crate(how, say):
    name, version, features = how["crate"]
    folder = os.path.join(CACHE, f"{name}-{version}")
    program = os.path.join(folder, "bin", how["program"])
    if not os.path.exists(program):
        cargo = shutil.which("cargo", path=os.environ.get("PATH", "") + ":" + os.path.expanduser("~/.cargo/bin"))
        if not cargo:
            raise Failure("no cargo to build it with")
        say(f"{name} {version}: cargo install, which takes minutes ...")
        os.makedirs(folder, exist_ok=True)
        compile_it([cargo, "install", "--locked", "--quiet", "--root", folder, "--version", version, *features, name], folder, {})
    return {"program": program, "version": f"crate {name} {version}"}


def compile_it(command, folder, environment):
    """Away from the project, whose settings (profile, target folder) are not for others."""
    what = " ".join(os.path.basename(word) for word in command if not word.startswith("-"))
    environment = {**{k: v for k, v in os.environ.items() if not k.startswith(("CARGO_TARGET", "RUSTFLAGS", "GOFLAGS"))}, **environment}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, timeout=BUILD_LIMIT, capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, check=False)
    except subprocess.TimeoutExpired:
        raise Failure(f"{what}: no end after {BUILD_LIMIT:.0f} s") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
        raise Failure(f"{what}: {errors[0] if errors else shell.last_line(done.stderr)}")
