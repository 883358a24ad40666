# shellcheck shell=bash
# shellcheck disable=SC2034
# For scripts that take signals while they wait. Sourced.

#: The exit code of a node's launcher that was asked to stop (EX_TEMPFAIL of sysexits.h: try again later).
ASKED=75

#: Seconds that a run has to end its step and to write its checkpoint after it was asked to; less than the --signal of
#: the batch scripts leaves before the end of the job's time.
LEAVE_SECONDS=${LEAVE_SECONDS:-240}

# alarm SECONDS: USR2 after them. What it leaves behind must not hold this script's output open.
alarm() {
    (trap - TERM USR1 USR2 && sleep "$1" && kill -USR2 $$) >/dev/null 2>&1 &
    timer=$!
}

# await PID: wait for the end of a child, however often a trap that sets "interrupted" cuts it short; its exit code is
# in "code".
await() {
    local status
    code=0
    while :; do
        interrupted=0
        status=0
        wait "$1" || status=$?
        ((status == 127)) || code=$status # 127: it was waited for already
        ((interrupted)) || break
    done
}
