# shellcheck shell=bash
# What a benchmark in the lab needs: the program, root, a lab of its own and its end, figures. Sourced first, with `repo` and `lab_sh` set.
# shellcheck disable=SC2154  # variables shared with the benchmark

say() { printf '%s\n' "$*"; }
note() { printf '%s\n' "$*" >&2; }
fail() { note "$(basename "$0" .sh): $*"; exit 2; }
number() { [[ ${1:-} =~ ^[1-9][0-9]{0,3}$ ]] || usage; printf '%s' "$1"; }

# build: as the user who called sudo, so that target/ and ~/.cargo stay theirs.
build() {
  # shellcheck disable=SC2016  # expanded by the inner shell
  local script='cd "$0" && PATH=$PATH:$HOME/.cargo/bin && exec cargo build --release --quiet'
  if ((EUID == 0)) && [[ -n ${SUDO_USER:-} && $SUDO_USER != root ]]; then
    sudo -u "$SUDO_USER" -H env ${CARGO_TARGET_DIR:+"CARGO_TARGET_DIR=$CARGO_TARGET_DIR"} bash -lc "$script" "$repo"
  else
    bash -c "$script" "$repo"
  fi
}

# find_tencrypt: builds it where TENCRYPT names none.
find_tencrypt() {
  if [[ -z ${TENCRYPT:-} ]]; then
    note "Building (cargo build --release) ..."
    build
    TENCRYPT=$(cd "$repo" && readlink -f "${CARGO_TARGET_DIR:-target}/release/tencrypt")
  fi
  [[ -x $TENCRYPT ]] || fail "no program at '$TENCRYPT'"
}

# become_root SCRIPT ARGUMENT...: goes on as root.
become_root() {
  ((EUID != 0)) || return 0
  command -v sudo >/dev/null || fail "needs root, for network namespaces"
  exec sudo env ${TENCRYPT:+"TENCRYPT=$TENCRYPT"} ${WIREGUARD_GO:+"WIREGUARD_GO=$WIREGUARD_GO"} "$@"
}

lab() { "$lab_sh" "$@" 2>>"$work/log"; }
in_pod() { local pod=$1; shift; lab exec "$pod" -- "$@"; }

# background POD CMD...: a server in a pod; the program takes the place of the shell that is its job.
background() {
  local pod=$1
  shift
  "$lab_sh" exec "$pod" -- "$@" </dev/null >>"$work/log" 2>&1 &
  pids+=($!)
}

# begin: a folder and a lab of this run, gone at its end; `at_end`, where there is one, is called before.
begin() {
  export TENCRYPT=${TENCRYPT:-} TENC_LAB=bench-$$
  PYTHON=/usr/bin/python3
  [[ -x $PYTHON ]] || PYTHON=python3
  work=$(mktemp -d)
  # shellcheck disable=SC2034  # read by the benchmark
  began=$SECONDS
  pids=()
  trap cleanup EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
}

cleanup() {
  local status=$? pid
  trap - EXIT
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait "${pids[@]}" 2>/dev/null || true
  "$lab_sh" down >/dev/null 2>&1 || true
  if declare -F at_end >/dev/null; then at_end; fi
  if ((status > 1)) && [[ -s $work/log ]]; then
    note "Log of the lab:"
    tail -n 40 "$work/log" | sed 's/^/  /' >&2
  fi
  rm -rf "$work"
  exit "$status"
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

# stats VALUE...: median, lowest, highest.
stats() {
  printf '%s\n' "$@" | sort -g | awk '{ v[NR] = $1 }
    END { m = int((NR + 1) / 2); print (NR % 2 ? v[m] : (v[m] + v[m + 1]) / 2), v[1], v[NR] }'
}

# middle VALUE...: the median alone.
middle() { stats "$@" | cut -d' ' -f1; }

fact() { printf '  %-22s %s\n' "$1" "$2"; }

# verdict MET GOAL MEASURED
verdict() {
  local word=met
  ((${1})) || { word=MISSED; missed=$((missed + 1)); }
  printf '%-8s%-58s%s\n' "$word" "$2" "$3"
}
