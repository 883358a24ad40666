#!/usr/bin/env bash
# What a job's step runs once on every node, and in every container: the launcher of this node's ranks. job.sh says by
# variables which engine, how many ranks, and where they meet.
#
# A request to stop (USR1, or the TERM of a preemption) goes to the ranks themselves: launchers would end them after 30
# seconds, with an error, and a checkpoint may take longer. The ranks then end with 0, as a finished run does, so the
# exit code of this script says that there was a request.

set -euo pipefail
source launch/slurm/await.sh

# shellcheck disable=SC2317
# The launcher's children are the ranks, or it is the only one; read from /proc, as containers may lack ps.
ranks() {
    local stat line fields
    if [ "${command[0]}" = python ]; then echo "$launcher" && return; fi
    for stat in /proc/[0-9]*/stat; do
        read -r line 2>/dev/null <"$stat" || continue
        read -r -a fields <<<"${line##*) }" # the name, in brackets, may hold anything
        [ "${fields[1]}" != "$launcher" ] || echo "${line%% *}"
    done
}

asked=0 timer='' launcher=''
pass_on() {
    local pids
    interrupted=1
    if ! ((asked)); then # a second request would end a rank without its checkpoint
        asked=1
        [ -n "$launcher" ] || return 0 # it is about to start, and is seen to there
        pids=$(ranks)
        # before there are ranks nothing would be lost
        # shellcheck disable=SC2086
        if [ -n "$pids" ]; then kill -USR1 $pids; else kill -TERM "$launcher"; fi 2>/dev/null || true
        alarm "$LEAVE_SECONDS"
    fi
}

late() {
    interrupted=1
    echo "$SLURMD_NODENAME: the run has not ended $LEAVE_SECONDS s after it was asked to"
    # shellcheck disable=SC2046
    kill -KILL $(ranks) "$launcher" 2>/dev/null || true
}

size=$((SLURM_NNODES * PROCESSES_PER_NODE))
case $PROGRAM/$ENGINE$size in
launch/compare.py/*) # it starts the launcher of every run itself; several runs at once have a share of the GPUs each
    command=(python) given=" $* " workers=1
    [[ ! $given =~ \ --workers[\ =]([0-9]+)\  ]] || workers=${BASH_REMATCH[1]}
    each=$((size / (workers > 1 ? workers : 1)))
    ((each)) || each=1
    if [ "$ENGINE$each" != ddp1 ]; then
        [[ $given == *" --config_file"* ]] || set -- "$@" --config_file "configs/accelerate/$ENGINE.yaml"
        [[ $given == *" --num_processes"* ]] || set -- "$@" --num_processes "$each"
    fi
    ;;
*/ddp1) command=(python) ;; # one rank needs no launcher
*/ddp*) # by torchrun, which starts several ranks on CPUs, too
    command=(torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$PROCESSES_PER_NODE" --node_rank "$SLURM_NODEID"
        --master_addr "$RENDEZVOUS_HOST" --master_port "$RENDEZVOUS_PORT")
    ;;
*)
    command=(accelerate launch --config_file "configs/accelerate/$ENGINE.yaml" --num_machines "$SLURM_NNODES"
        --num_processes "$size" --machine_rank "$SLURM_NODEID"
        --main_process_ip "$RENDEZVOUS_HOST" --main_process_port "$RENDEZVOUS_PORT")
    ;;
esac
trap pass_on TERM USR1 # first: a script that ended here would leave its launcher behind
trap late USR2
# in a session of its own, where Slurm's signals to this script's group do not reach it
setsid "${command[@]}" "$PROGRAM" "$@" &
launcher=$!
! ((asked)) || kill -TERM "$launcher" 2>/dev/null || true
await "$launcher"
[ -z "$timer" ] || kill "$timer" 2>/dev/null || true
! ((asked)) || exit "$ASKED"
exit "$code"
