#!/usr/bin/env bash
# One rank: its share of the cores, then `distcnn train`. node.sh has torchrun or accelerate start it.
#
# Exit codes are noted for node.sh. Of 75 (stopped on request, saved) and 2 (a wrong flag, bad data) torchrun hears 0: it
# would take them for crashes, and start the ranks again.
set -uo pipefail
trap : INT # the rank has it as well, and this shell waits for it (TERM, USR1 and USR2 are ignored since node.sh)

rank=${LOCAL_RANK:-0}
size=${LOCAL_WORLD_SIZE:-1}
rm -f -- "$DISTCNN_VERDICTS/$rank"

# Neighbouring cores of one socket to each rank: threads that wander between sockets read memory across the link.
# DISTCNN_BIND=0 leaves the cores to the operating system.
if [[ ${DISTCNN_BIND:-1} == 1 ]] && ((size > 1)) && command -v taskset lscpu >/dev/null; then
    allowed=$(taskset -cp $$ | sed 's/.*: //' | tr , '\n' |
        awk -F- '{ for (core = $1; core <= (NF > 1 ? $2 : $1); core++) print core }')
    mapfile -t cores < <(lscpu --parse=CPU,CORE,NODE | grep -v '^#' | sort -t, -k3,3n -k2,2n -k1,1n | cut -d, -f1 |
        grep -Fx -f <(echo "$allowed"))
    share=$((${#cores[@]} / size))
    if ((share > 0)); then
        mine=$(IFS=,; echo "${cores[*]:rank * share:share}")
        taskset -cp "$mine" $$ >/dev/null && export DISTCNN_BOUND=$size OMP_NUM_THREADS=$share
    fi
fi

"$DISTCNN_PYTHON" -m distcnn train "$@"
code=$?
((code == 0)) || echo "$code" >"$DISTCNN_VERDICTS/$rank"
((code == 75 || code == 2)) && exit 0
exit "$code"
