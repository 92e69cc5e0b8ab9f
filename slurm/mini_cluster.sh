#!/usr/bin/env bash
# A real Slurm cluster on this machine alone: munge, slurmctld and two or more slurmd, without accounting. For trying
# `trainyard submit` and for tests/slurm. Needs Debian's slurm-wlm and munge (not slurm-wlm-emulator); no systemd.
#   eval "$(slurm/mini_cluster.sh up --nodes 3)"   # sets SLURM_CONF, by which sbatch, squeue and the like find it
#   slurm/mini_cluster.sh down
# Everything is in one folder with sockets, ports and a key of its own: $TRAINYARD_MINI_CLUSTER, by default
# /tmp/trainyard-mini-cluster-UID. `up` again starts what has died; `down` also ends what a kill has left behind.
# Partitions: train (GraceTime 30 s, preempted and requeued by jobs of urgent) and urgent. Features: cpu, odd, even. Every
# node has the host's cores and memory and two GPUs that are only names. A node that is silent for 10 s is down.
set -euo pipefail

fail() {
  echo "mini_cluster.sh: error: $1" >&2
  exit 1
}

command="${1:-}"
nodes=2
case "$#:$command:${2:-}" in
  1:up:* | 1:down:*) ;;
  3:up:--nodes) nodes="$3" ;;
  *) echo "usage: mini_cluster.sh up [--nodes N] | down" >&2 && exit 2 ;;
esac
[[ "$nodes" =~ ^[1-9][0-9]?$ ]] || fail "--nodes is '$nodes', not a number from 1 to 99"
folder="${TRAINYARD_MINI_CLUSTER:-/tmp/trainyard-mini-cluster-$(id -u)}"
[[ "$folder" =~ ^/[A-Za-z0-9._/-]{1,80}$ ]] ||
  fail "TRAINYARD_MINI_CLUSTER is '$folder': an absolute path of at most 80 plain characters is needed (a socket is in it)"
PATH="$PATH:/usr/sbin:/sbin" # where the daemons are, and a user's shell often does not look
conf="$folder/slurm.conf"

# Process numbers of this cluster: its daemons, by the configuration that they were started with, and what its jobs run.
processes() {
  local environ
  { grep -lzxF "SLURM_CONF=$conf" /proc/[0-9]*/environ 2>/dev/null || true; } | while read -r environ; do
    if grep -qE '^(munged|slurm.*)$' "${environ%environ}comm" 2>/dev/null || grep -qz '^SLURM_JOB_ID=' "$environ" 2>/dev/null; then
      basename "${environ%/environ}"
    fi
  done
}

is_running() { # name of the program, file with its process number
  local pid
  pid="$(cat "$2" 2>/dev/null)" && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ] &&
    grep -qzxF "SLURM_CONF=$conf" "/proc/$pid/environ" 2>/dev/null
}

# A daemon keeps no file of its caller's open: a lock or a pipe would be held as long as it lives.
start() {
  (
    for descriptor in /proc/self/fd/*; do
      descriptor="${descriptor##*/}"
      [ "$descriptor" -le 2 ] || eval "exec $descriptor>&-"
    done
    exec env SLURM_CONF="$conf" "$@" </dev/null >>"$folder/start.log" 2>&1
  ) || fail "$1 did not start: $(tail -n 3 "$folder/start.log" | tr '\n' ' ')(all: $folder/start.log)"
}

refuse_other_slurm() {
  local place
  for place in /etc/slurm/slurm.conf /etc/slurm-llnl/slurm.conf /usr/local/etc/slurm.conf /run/slurm/conf/slurm.conf; do
    [ ! -e "$place" ] || fail "this host belongs to a Slurm cluster ($place): submit there, or use another machine"
  done
  [ -z "${SLURM_CONF:-}" ] || [ "$SLURM_CONF" = "$conf" ] ||
    fail "SLURM_CONF names another cluster ($SLURM_CONF): unset it, or set TRAINYARD_MINI_CLUSTER to its folder"
}

free_ports() { # the first of so many ports without a listener
  local base port
  for base in $(seq 17000 100 30000); do
    for port in $(seq "$base" $((base + $1 - 1))); do
      if (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then continue 2; fi
    done
    echo "$base" && return
  done
  fail "no free ports between 17000 and 30000"
}

write_configuration() {
  local user port host cores memory_mib node kind
  user="$(id -un)"
  port="$(free_ports $((nodes + 1)))"
  host="$(hostname -s)"
  cores="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)" # which would believe these
  memory_mib=$(($(awk '/^MemTotal/ {print $2}' /proc/meminfo) / 1024))
  {
    cat <<END
# Written by mini_cluster.sh.
ClusterName=mini
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$user
SlurmdUser=$user
SlurmctldPort=$port
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
StateSaveLocation=$folder/state
SlurmdPidFile=$folder/%n.pid
SlurmdLogFile=$folder/%n.log
SlurmdSpoolDir=$folder/%n
AuthType=auth/munge
# a requeued job waits until its old credentials are void: seconds instead of two minutes
AuthInfo=socket=$folder/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# several nodes share the cores of this host
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
MessageTimeout=5
KillWait=20
InactiveLimit=0
TreeWidth=100
GresTypes=gpu
END
    for node in $(seq "$nodes"); do
      kind=$([ $((node % 2)) = 1 ] && echo odd || echo even)
      echo "NodeName=n$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + node)) CPUs=$cores" \
        "RealMemory=$memory_mib Gres=gpu:2 Feature=cpu,$kind State=UNKNOWN"
    done
    echo "PartitionName=train Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 State=UP"
    echo "PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP"
  } >"$conf"
  # slurmd drops a GPU without a file; nothing opens these two
  printf 'Name=gpu File=/dev/%s\n' null zero >"$folder/gres.conf"
}

up() {
  local program node wanted state
  for program in munged slurmctld slurmd sinfo; do
    command -v "$program" >/dev/null || fail "$program is missing: apt-get install slurm-wlm munge (not slurm-wlm-emulator)"
  done
  refuse_other_slurm
  wanted="$(grep -c ^NodeName= "$conf" 2>/dev/null || true)"
  if [ "${wanted:-0}" != "$nodes" ]; then
    down
    mkdir -p "$folder/state"
    write_configuration
    (umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
  fi
  if ! is_running munged "$folder/munge.pid"; then
    rm -f "$folder"/munge.socket* # of one that was killed
    start munged --force --num-threads=2 --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
      --pid-file="$folder/munge.pid" --log-file="$folder/munge.log" --seed-file="$folder/munge.seed"
  fi
  is_running slurmctld "$folder/slurmctld.pid" || start slurmctld
  for node in $(seq "$nodes"); do
    is_running slurmd "$folder/n$node.pid" || start slurmd -N "n$node"
  done
  for _ in $(seq 40); do
    state="$(SLURM_CONF="$conf" sinfo --noheader --Node --partition=train --format='%N %T' 2>&1 || true)"
    [ "$(grep -cE '^n[0-9]+ (idle|mixed|allocated|completing)$' <<<"$state")" != "$nodes" ] || break
    sleep 0.2
  done
  [ "$(grep -cE '^n[0-9]+ (idle|mixed|allocated|completing)$' <<<"$state")" = "$nodes" ] ||
    fail "not all $nodes nodes came up in 30 s: $(tr '\n' ' ' <<<"$state"); their logs are in $folder"
  echo "mini_cluster.sh: $nodes nodes are up; end them with: mini_cluster.sh down" >&2
  echo "export SLURM_CONF=$conf"
}

down() {
  local pids
  [ ! -d "$folder" ] || [ -e "$conf" ] || [ -z "$(ls -A "$folder")" ] ||
    fail "$folder is not a folder of a mini cluster: nothing was removed"
  while pids="$(processes)" && [ -n "$pids" ]; do # again: one of them may just have started another
    # shellcheck disable=SC2086 # several numbers; nothing is kept, so nothing has to end in order
    kill -KILL $pids 2>/dev/null || true
    sleep 0.1
  done
  rm -rf "$folder"
}

"$command"
