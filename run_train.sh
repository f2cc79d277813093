#!/usr/bin/env bash
# Train: ./run_train.sh [FILE.toml] [--section.key value ...]
#
#   CONFIG         the TOML file, or the name of one in train_configs/ (debug_model); CONFIG_FILE is the same thing
#   NGPU           processes on this machine (1); on a machine without GPUs they share its processors
#   LOG_RANK       whose output is shown when there are several processes, such as 0,1 (0)
#   MAX_RESTARTS   how often torchrun starts all processes again after one has died (0)
#   NNODES, NODE_RANK, RDZV_ENDPOINT    several machines: how many, which one this is (from 0), and host:port of number 0
#
#   NGPU=2 CONFIG=smollm2_135m_full ./run_train.sh --training.steps 10
#   ./run_train.sh --help
#
# Paths are relative to the current directory, wherever this file lies. Exit codes: 0 done, 2 a mistake to mend, 75 stopped
# by a signal and saved, 124 something hung, 1 anything else. bash 3.2 (macOS) must be able to run this file.
set -euo pipefail

script=${BASH_SOURCE[0]}
while [ -h "$script" ]; do # a link to this file: the repository is where the file is
    link=$(readlink "$script")
    case $link in /*) script=$link ;; *) script=$(dirname "$script")/$link ;; esac
done
REPO=$(CDPATH='' cd -- "$(dirname "$script")" && pwd -P)

fail() {
    echo "run_train.sh: $1" >&2
    exit 2
}

NGPU=${NGPU:-1} NNODES=${NNODES:-1} MAX_RESTARTS=${MAX_RESTARTS:-0} LOG_RANK=${LOG_RANK:-0}
for name in NGPU NNODES; do
    case ${!name} in '' | 0* | *[!0-9]*) fail "$name must be a whole number from 1 up, not '${!name}'" ;; esac
done
case $MAX_RESTARTS in *[!0-9]*) fail "MAX_RESTARTS must be a whole number, not '$MAX_RESTARTS'" ;; esac
if [ "$NNODES" -gt 1 ] && { [ -z "${RDZV_ENDPOINT:-}" ] || [ -z "${NODE_RANK:-}" ]; }; then
    fail "with NNODES=$NNODES, every machine needs NODE_RANK (0 to $((NNODES - 1))) and RDZV_ENDPOINT (host:port of machine 0)"
fi
if [ "$NNODES" -gt 1 ]; then
    case $NODE_RANK in *[!0-9]*) fail "NODE_RANK must be a whole number from 0 to $((NNODES - 1)), not '$NODE_RANK'" ;; esac
    [ "$NODE_RANK" -lt "$NNODES" ] || fail "NODE_RANK must be a whole number from 0 to $((NNODES - 1)), not '$NODE_RANK'"
fi

config=${CONFIG:-${CONFIG_FILE:-}}
case ${1:-} in
'' | -*) ;;
*) # ./run_train.sh mine.toml
    [ -z "$config" ] || [ "$config" = "$1" ] || fail "CONFIG ($config) and the first word ($1) both name a config; give one"
    config=$1
    shift
    ;;
esac
if [ -n "${CONFIG_FILE:-}" ] && [ "$CONFIG_FILE" != "$config" ]; then
    fail "CONFIG ($CONFIG) and CONFIG_FILE ($CONFIG_FILE) differ; give one"
fi
shipped=$REPO/train_configs
[ "$PWD" = "$REPO" ] && shipped=train_configs
help=no named=no
for word in "$@"; do
    case $word in
    --help | -h) help=yes ;;
    --job.config_file | --job.config_file=*) named=yes ;;
    esac
done
if [ -z "$config" ]; then
    [ $named = yes ] || config=debug_model
fi
case $config in */*) ;; *) # a bare name: a file here, else one of ours
    if [ -n "$config" ] && [ ! -f "$config" ]; then
        for file in "$shipped/$config" "$shipped/$config.toml"; do
            [ -f "$file" ] && config=$file && break
        done
    fi
    ;;
esac
[ -z "$config" ] || set -- "$config" "$@"

. "$REPO/scripts/make_env.sh"
find_or_make_env "$REPO"
export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH}

# Mistakes in the config end here, once, before torch is loaded in every process.
if [ $help = yes ]; then
    WORLD_SIZE=$((NGPU * NNODES)) exec "$PYTHON" -m tunelib.config "$@"
fi
resolved=$(mktemp "${TMPDIR:-/tmp}/tunelib.XXXXXX")
if ! said=$(WORLD_SIZE=$((NGPU * NNODES)) "$PYTHON" -m tunelib.config "$@" 2>&1 >"$resolved"); then
    rm -f "$resolved"
    printf '%s\n' "$said" >&2 # notices of a good one are said by train.py
    exit 2
fi
grace=$(sed -n 's/^grace_seconds = \([0-9]*\)$/\1/p' "$resolved") # of [checkpoint]; nothing where nothing is saved
rm -f "$resolved"

if [ "$NGPU" -eq 1 ] && [ "$NNODES" -eq 1 ]; then
    exec "$PYTHON" "$REPO/train.py" "$@"
fi

# Workers leave their exit codes in this folder, and torchrun its logs; the launcher removes it.
folder=$(mktemp -d "${TMPDIR:-/tmp}/tunelib.XXXXXX")
processors=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
threads=$((processors / NGPU))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export TUNELIB_EXIT_CODE_FILE=$folder/exit_code
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-${grace:-300}} # seconds to save in; torchrun kills after 30
# one variable for each spelling that torch has had: what torchrun passes on, SIGUSR1 being the warning of batch systems
export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export PET_SIGNALS_TO_HANDLE=$TORCHELASTIC_SIGNALS_TO_HANDLE
# One store for all restarts would show ranks that start again each other's old addresses, until a timeout.
[ "$MAX_RESTARTS" -eq 0 ] || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
if [ "$NNODES" -gt 1 ]; then
    is_host=false
    [ "$NODE_RANK" -eq 0 ] && is_host=true
    set -- --rdzv_endpoint "$RDZV_ENDPOINT" --rdzv_conf "is_host=$is_host" "$REPO/train.py" "$@"
else
    set -- --rdzv_endpoint localhost:0 --local_addr localhost "$REPO/train.py" "$@" # port 0: any free one, so that runs do not meet
fi
exec "$PYTHON" -m tunelib.parallel.launch --nnodes "$NNODES" --nproc_per_node "$NGPU" --max_restarts "$MAX_RESTARTS" --rdzv_backend c10d \
    --role rank --tee 3 --local_ranks_filter "$LOG_RANK" --log_dir "$folder" "$@"
