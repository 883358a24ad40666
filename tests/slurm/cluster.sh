#!/usr/bin/env bash
# A Slurm of two nodes on this machine, for tests: a controller and two node daemons (n1 and n2) over the loopback, with
# a munge of their own. Jobs of partition "low" are preempted and requeued by jobs of partition "high".
#
#   cluster.sh start DIR    as root, with slurm-wlm and munge installed; prints DIR/slurm.conf, for SLURM_CONF
#   cluster.sh stop DIR     ends what was started for DIR, jobs included, and nothing else
#
# DIR must be empty or absent, and short: a socket lies in it. No other user may write to it.
set -euo pipefail

readonly GRACE=30  # seconds that a preempted job has; Slurm's own requeue comes after them
readonly NODES=(n1 n2)

fail() {
    echo "cluster.sh: $*" >&2
    exit 1
}

# free_port AFTER: the first port above it that nobody listens on
free_port() {
    local port=$(($1 + 1))
    while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
    echo "$port"
}

write_config() {
    local host controller port=0 node
    host=$(hostname -s)
    controller=$(free_port $((16000 + RANDOM % 8000)))
    port=$controller
    cat >"$dir/slurm.conf" <<END
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits until its first credential has run out: two minutes, if this did not say less
AuthInfo=socket=$dir/munge.socket,cred_expire=10
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
ReturnToService=2
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdSpoolDir=$dir/spool.%n
SlurmdPidFile=$dir/%n.pid
SlurmdLogFile=$dir/%n.log
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
END
    echo "Name=gpu File=/dev/null" >"$dir/gres.conf" # in name alone, so that scripts which ask for a GPU are taken
    for node in "${NODES[@]}"; do
        port=$(free_port "$port")
        echo "NodeName=$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$port CPUs=1 Gres=gpu:1" >>"$dir/slurm.conf"
    done
    cat >>"$dir/slurm.conf" <<END
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
END
}

start() {
    local node
    [ "$(id -u)" = 0 ] || fail "needs root: node daemons start jobs as other users"
    for node in munged slurmctld slurmd; do
        command -v "$node" >/dev/null || fail "$node is not installed: apt-get install slurm-wlm munge"
    done
    mkdir -p "$dir/state"
    [ ! -e "$dir/slurm.conf" ] || fail "$dir has been used: give another folder"
    write_config
    export SLURM_CONF=$dir/slurm.conf
    (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
    munged --key-file "$dir/munge.key" --socket "$dir/munge.socket" --pid-file "$dir/munged.pid" \
        --log-file "$dir/munged.log" --seed-file "$dir/munged.seed"
    slurmctld -c
    for node in "${NODES[@]}"; do slurmd -N "$node"; done
    for _ in {1..60}; do
        if [ "$(sinfo --noheader --Node --partition low --states idle --format %N 2>/dev/null | wc -l)" = ${#NODES[@]} ]
        then
            echo "$SLURM_CONF"
            return
        fi
        sleep 0.5
    done
    for node in "$dir"/*.log; do tail -n 10 "$node" >&2; done
    stop
    fail "the nodes are not up after 30 s"
}

# end NAME: the daemon whose pid file is DIR/NAME.pid, if it is there, and wait for its end
end() {
    local pid
    [ -s "$dir/$1.pid" ] || return 0
    pid=$(cat "$dir/$1.pid")
    kill "$pid" 2>/dev/null || return 0
    for _ in {1..100}; do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
}

stop() {
    local name environment
    export SLURM_CONF=$dir/slurm.conf
    scancel --user=root 2>/dev/null || true
    for _ in {1..20}; do # the node daemons end the jobs' processes
        [ -n "$(squeue --noheader 2>/dev/null)" ] || break
        sleep 0.5
    done
    for environment in /proc/[0-9]*/environ; do # and by process group miss those that have left theirs
        if tr '\0' '\n' <"$environment" | grep -qx "SLURM_CONF=$SLURM_CONF" &&
            tr '\0' '\n' <"$environment" | grep -q '^SLURM_JOB_ID='; then
            name=${environment#/proc/}
            kill -KILL "${name%/environ}" || true
        fi
    done 2>/dev/null
    for name in "${NODES[@]}" slurmctld munged; do end "$name"; done
}

[ $# = 2 ] || fail "usage: cluster.sh start|stop DIR"
mkdir -p "$(dirname "$2")"
dir=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
case $1 in
start) start ;;
stop) stop ;;
*) fail "usage: cluster.sh start|stop DIR" ;;
esac
