# shellcheck shell=bash
# What the batch scripts of this folder have in common; they source it, from the repository's root.
#
#   train [--engine NAME] [--image IMAGE] --config FILE [section.key=value ...]
#   compare [--engine NAME] [--image IMAGE] --config FILE [...]
#
# trains on all nodes of the job, or makes a comparison's runs on one, and ends it: done, failed, or back in the queue, from where the run goes on. A batch
# script that ends with 0 is complete to Slurm, even while it is being preempted, and one that is out of time is not
# requeued either: so it has to ask for it.

set -euo pipefail
source launch/slurm/await.sh

#: How often a job goes back to the queue, so that one that gets nowhere ends.
MOST_REQUEUES=${MOST_REQUEUES:-100}

fail() {
    echo "error: $*" >&2
    exit 2
}

# The engines are the files of configs/accelerate/.
check_engine() {
    local names
    names=$(basename -s .yaml configs/accelerate/*.yaml | paste -s -d ' ')
    [ -f "configs/accelerate/$1.yaml" ] || fail "--engine '$1': configs/accelerate/ has no such file; choose from: $names"
}

# Sets engine, image, and arguments: what is the trainer's own.
read_arguments() {
    engine=ddp image='' arguments=()
    while (($#)); do
        case $1 in
        --engine=* | --image=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;&
        --engine | --image | --engine=* | --image=*)
            [ -n "${2:-}" ] || fail "$1 needs a value"
            case $1 in --engine) engine=$2 ;; --image) image=$2 ;; esac
            shift 2
            ;;
        --resume | --resume=* | --overwrite)
            fail "$1: every life of the job goes on from the newest checkpoint (--resume auto), the first one too;" \
                "leave it out, and choose another run.name for a new run"
            ;;
        *) arguments+=("$1") && shift ;;
        esac
    done
    check_engine "$engine"
}

# The address by which Slurm itself reaches the first node; its name may be no host's.
first_address() {
    local node
    node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    scontrol --oneliner show node "$node" | grep -o 'NodeAddr=[^ ]*' | cut -d = -f 2
}

# Sets inside: what srun starts a node's launcher through.
choose_container() {
    local gpus=()
    inside=()
    [ -n "$image" ] || return 0
    if srun --help 2>/dev/null | grep -q -- --container-image; then # enroot, by pyxis
        inside=(--container-image="$image" --container-mounts="$PWD:$PWD" --container-workdir="$PWD")
    elif command -v apptainer >/dev/null; then
        [ -z "${SLURM_GPUS_ON_NODE:-}" ] || gpus=(--nv)
        inside=(apptainer exec "${gpus[@]}" --bind "$PWD" --pwd "$PWD" "$image")
    else
        fail "--image '$image': this cluster has neither apptainer nor pyxis (enroot); load its module, or leave --image out"
    fi
}

# The end of a life that was asked to stop. A job that somebody has cancelled stays so.
requeue() {
    local state job=$SLURM_JOB_ID
    # an array has the number of its last task, which alone is meant
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    state=$(squeue --noheader --jobs "$job" --format %T)
    if [ "$state" != RUNNING ]; then
        echo "job $SLURM_JOB_ID: ${state:-gone}, and not requeued"
        exit "$ASKED"
    fi
    ((${SLURM_RESTART_COUNT:-0} < MOST_REQUEUES)) ||
        fail "job $SLURM_JOB_ID was requeued $SLURM_RESTART_COUNT times; see what it gets done, then submit it again"
    echo "job $SLURM_JOB_ID: requeued; it goes on from the newest checkpoint"
    trap '' TERM USR1
    scontrol requeue "$job"
    exit "$ASKED"
}

asked=0
ask() {
    interrupted=1
    if ! ((asked)); then
        asked=1
        echo "job $SLURM_JOB_ID: asked to stop"
        [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null || true # srun hands it on to every node
        alarm $((LEAVE_SECONDS + 20)) # the nodes see to it; this is for one that does not answer
    fi
}

late() {
    echo "job $SLURM_JOB_ID: not all nodes have ended their ranks"
    requeue
}

train() { run_program launch/train.py --resume auto -- "$@"; }

# compare ARGUMENTS: launch/compare.py, which finds by itself where its runs were.
compare() { run_program launch/compare.py -- "$@"; }

# run_program PROGRAM [LAST ARGUMENT ...] -- ARGUMENTS
run_program() {
    local step='' timer='' code last=()
    export PROGRAM=$1
    shift
    while [ "$1" != -- ]; do last+=("$1") && shift; done
    shift
    trap ask TERM USR1
    trap late USR2
    read_arguments "$@"
    choose_container
    # made in the repository, unless another environment is active, or a container brings its own
    [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}$image" ] || [ ! -d .venv/bin ] || PATH=$PWD/.venv/bin:$PATH
    RENDEZVOUS_HOST=$(first_address)
    export LEAVE_SECONDS RENDEZVOUS_HOST RENDEZVOUS_PORT=$((20000 + SLURM_JOB_ID % 10000)) ENGINE=$engine
    export PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((${SLURM_CPUS_PER_TASK:-1} + PROCESSES_PER_NODE - 1) / PROCESSES_PER_NODE))}
    # srun does not take it from the job any more, and would bind every node's ranks to one core
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    # one node may end before another: none is to be killed for it
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 \
        "${inside[@]}" bash launch/slurm/node.sh "${arguments[@]}" "${last[@]}" &
    step=$!
    ! ((asked)) || kill -USR1 "$step" 2>/dev/null || true
    await "$step"
    [ -z "$timer" ] || kill "$timer" 2>/dev/null || true
    if ((asked)) || ((code == ASKED)); then requeue; fi
    exit "$code"
}
