# shellcheck shell=bash
# For scripts that take signals while they wait. Sourced.

#: The exit code of a node's launcher that was asked to stop (EX_TEMPFAIL of sysexits.h: try again later).
ASKED=75

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
