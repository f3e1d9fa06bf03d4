"""Interoperability with other implementations of WireGuard. `../interop.sh` says how it is called.

1. `--prepare FILE` (as the user): arguments are checked, implementations installed; what was found goes to FILE
2. `--prepared FILE` (as root): a lane per implementation and address family, all at once, each in namespaces of its own
   (lane.py); then everything is removed, and the last line counts

Line rate is one lane's at a time. Lanes of IPv4 begin with it, those of IPv6 with the long quiet phase: so neither kind waits for
the other.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
REPO = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [os.path.join(REPO, "bench", "lib"), os.path.join(REPO, "tests", "vectors")]

# pylint: disable=wrong-import-position
import install
from lane import Full, Lane, Quick, Stopped
from shell import Failure

# Name for install.py, title, arguments before the name of the device.
IMPLEMENTATIONS = {
    "wireguard-go": ("wireguard-go", ["--foreground"]),
    "wireguard-go-module": ("wireguard-go (module)", ["--foreground"]),
    "gotatun": ("gotatun", ["--foreground", "--disable-drop-privileges"]),
}
# Of the whole run, in seconds; every single step has a limit of its own.
LIMIT = {True: 300, False: 1800}


def say(text):
    print(text, file=sys.stderr, flush=True)


def implementations(text):
    chosen = text.split(",")
    for name in chosen:
        if name not in IMPLEMENTATIONS:
            raise argparse.ArgumentTypeError(f"no implementation '{name}' (one of: {', '.join(IMPLEMENTATIONS)})")
    return [name for name in IMPLEMENTATIONS if name in chosen]


def arguments(argv):
    parser = argparse.ArgumentParser(prog="interop.sh", allow_abbrev=False, description=(
        "Tencrypt's agent against other implementations of WireGuard, in network namespaces."))
    parser.add_argument("--only", metavar="LIST", type=implementations, default=list(IMPLEMENTATIONS),
                        help=f"only these: {', '.join(IMPLEMENTATIONS)}")
    parser.add_argument("--quick", action="store_true",
                        help="under 2 minutes: 20 s at one packet per 3 s, without a rekey, and 8 s at line rate")
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    parser.add_argument("--prepared", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def prepare(args):
    found = {name: install.install(name, say) for name in args.only}
    with open(args.prepare, "w", encoding="utf-8") as file:
        json.dump(found, file)
    # What cannot be had cannot be proven: no run that looks complete.
    return 2 if any("reason" in one for one in found.values()) else 0


class Run:
    """What the lanes share: their results, the turn at line rate, the word to stop."""

    def __init__(self, phase):
        self.phase = phase
        self.passed = self.failed = 0
        self.line_rate = threading.Lock()
        self.stopping = threading.Event()
        self.began = time.monotonic()
        self._mutex = threading.Lock()

    def seconds(self):
        return time.monotonic() - self.began

    def result(self, title, name, detail, failed=False):
        with self._mutex:
            if failed:
                self.failed += 1
            else:
                self.passed += 1
            print(f"{self.seconds():4.0f} s  {'FAILED' if failed else 'ok':6}  {title:28}  {name:24}  {detail}", flush=True)


def run(args, found, program):
    state = Run(Quick() if args.quick else Full())
    print(f"Tencrypt: {program}")
    for name in args.only:
        print(f"{IMPLEMENTATIONS[name][0]}: {found[name]['version']}")
    with tempfile.TemporaryDirectory(prefix="tencrypt-interop-") as work:
        lanes = []
        for family in (4, 6):
            for name in args.only:
                title, extra = IMPLEMENTATIONS[name]
                lanes.append(Lane(state, len(lanes), title, family, program, [found[name]["program"], *extra], work))
        threads = [threading.Thread(target=follow, args=(state, lane), daemon=True) for lane in lanes]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(max(0.0, LIMIT[args.quick] - state.seconds()))
                if thread.is_alive():
                    raise Failure(f"no end after {LIMIT[args.quick]} s")
        finally:
            # From here on nobody interrupts: what was made goes.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            state.stopping.set()
            for lane in lanes:
                lane.down()
            for thread in threads:
                if thread.ident:
                    thread.join(30)
            # A lane that was about to make something when the word came has made it now.
            for lane in lanes:
                lane.down()
    print(f"{state.passed} passed, {state.failed} failed ({state.seconds():.0f} s)")
    return 1 if state.failed else 0


def follow(state, lane):
    """One lane from its namespaces to its last check."""
    try:
        lane.run()
    except Stopped:
        pass
    except Failure as failure:
        if not state.stopping.is_set():
            state.result(lane.title, lane.doing, str(failure), failed=True)
            for line in lane.last_words():
                say(f"        {line}")
    except Exception as error:  # pylint: disable=broad-except
        state.result(lane.title, lane.doing, f"{type(error).__name__}: {error}", failed=True)
    finally:
        if not state.stopping.is_set():
            lane.down()


def interrupted(number, _frame):
    raise SystemExit(128 + number)


def main(argv):
    args = arguments(argv)
    if args.prepare:
        return prepare(args)
    if not args.prepared:
        say("interop: start it as tests/interop.sh")
        return 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    with open(args.prepared, encoding="utf-8") as file:
        found = json.load(file)
    os.unlink(args.prepared)
    try:
        return run(args, found, os.environ["TENCRYPT"])
    except Failure as failure:
        say(f"interop: {failure}")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
