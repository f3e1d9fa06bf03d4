"""Processes and namespaces: everything the benchmark starts runs through here, with a time limit, and ends with it."""

import os
import signal
import subprocess
import time

PYTHON = "/usr/bin/python3" if os.access("/usr/bin/python3", os.X_OK) else "python3"
PROBE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "probe.py")
TICKS = os.sysconf("SC_CLK_TCK")


class Failure(Exception):
    """Something of one row or one measurement did not work; the text is its reason."""


class Unavailable(Failure):
    """A row that cannot be had on this machine, or of this program."""


def last_line(text):
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:160] if lines else "no message"


def run(*argv, limit=20.0, stdin=None, cwd=None):
    """Runs a program to its end; its output. Fails by exit status and by time."""
    argv = [str(a) for a in argv]
    try:
        done = subprocess.run(argv, input=stdin, cwd=cwd, timeout=limit, capture_output=True, text=True,
                              stdin=subprocess.DEVNULL if stdin is None else None, check=False)
    except subprocess.TimeoutExpired:
        raise Failure(f"{os.path.basename(argv[0])}: no end after {limit:.0f} s") from None
    except OSError as error:
        raise Failure(f"{argv[0]}: {error.strerror}") from None
    if done.returncode:
        raise Failure(f"{' '.join(argv[:4])}: {last_line(done.stderr or done.stdout)}")
    return done.stdout


def inside(namespace, *argv):
    """The command line that runs a program in a namespace; it keeps the process that is started."""
    return ["ip", "netns", "exec", namespace, *[str(a) for a in argv]]


def probe(namespace, *argv):
    return inside(namespace, PYTHON, "-I", PROBE, *argv)


class Process:
    """A program in the background, in a process group of its own; its output goes to a file, the last start's alone."""

    def __init__(self, argv, log, stdin=subprocess.DEVNULL, stdout=None, env=None):
        self.log = log
        with open(log, "wb") as out:
            self.popen = subprocess.Popen([str(a) for a in argv], stdin=stdin, stdout=out if stdout is None else stdout,
                                          stderr=out, start_new_session=True, env={**os.environ, **(env or {})})
        self.pid = self.popen.pid

    def running(self):
        return self.popen.poll() is None

    def said(self):
        with open(self.log, encoding="utf-8", errors="replace") as text:
            return text.read()

    def await_line(self, start, limit=10.0, step=0.005):
        """Waits until the program has written a line that begins so."""
        deadline = time.monotonic() + limit
        while True:
            found = [line for line in self.said().splitlines() if line.startswith(start)]
            if found:
                return found[0]
            if not self.running():
                raise Failure(f"{os.path.basename(self.log)} ended: {last_line(self.said())}")
            if time.monotonic() > deadline:
                raise Failure(f"{os.path.basename(self.log)}: no '{start}' after {limit:.0f} s")
            time.sleep(step)

    def wait(self, limit):
        try:
            return self.popen.wait(limit)
        except subprocess.TimeoutExpired:
            self.stop(0)
            raise Failure(f"{os.path.basename(self.log)}: no end after {limit:.0f} s") from None

    def stop(self, patience=5.0):
        """SIGTERM, then SIGKILL to the group; true when the first was enough."""
        orderly = True
        if self.running():
            self._signal(signal.SIGTERM)
            try:
                self.popen.wait(patience)
            except subprocess.TimeoutExpired:
                orderly = False
        self._signal(signal.SIGKILL)
        self.popen.wait()
        return orderly

    def _signal(self, number):
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            pass


def until(condition, what, limit=10.0, step=0.01):
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise Failure(f"{what}: not after {limit:.0f} s")
        time.sleep(step)


# ---- what /proc says

def read(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def stat(pid):
    """The fields of /proc/PID/stat from the state on; empty when it is gone."""
    return read(f"/proc/{pid}/stat").rpartition(")")[2].split()


def processes():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def descendants(roots):
    """These processes and all that come from them."""
    children = {}
    for pid in processes():
        fields = stat(pid)
        if fields:
            children.setdefault(int(fields[1]), []).append(pid)
    found, todo = [], list(roots)
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, [])
    return found


def cpu_times(pids):
    """User and system time so far of each of these processes, all its threads, in ticks."""
    found = {}
    for pid in pids:
        fields = stat(pid)
        if fields:
            found[pid] = int(fields[11]) + int(fields[12])
    return found


def cpu_seconds(pids, before):
    """What they have spent since; one that has ended meanwhile is left out, one that is new counts whole."""
    return sum(now - before.get(pid, 0) for pid, now in cpu_times(pids).items()) / TICKS


def kernel_threads():
    """The processes that are the kernel's own (children of kthreadd)."""
    return [pid for pid in processes() if stat(pid)[1:2] == ["2"]]


def private_bytes(pid):
    """Memory that is this process's alone: Private_* of smaps_rollup."""
    return sum(int(line.split()[1]) for line in read(f"/proc/{pid}/smaps_rollup").splitlines()
               if line.startswith("Private_")) * 1024


def switches(pid):
    """How often the threads of a process were put on a CPU again, so far."""
    total = 0
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return 0
    for task in tasks:
        for line in read(f"/proc/{pid}/task/{task}/status").splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                total += int(line.split()[1])
    return total
