# shellcheck shell=bash
# The body of a batch job: one task a node, a request to stop passed on in time, queued again once all is saved.
#
# A job script sets what differs and sources this file; its arguments are the flags of `distcnn train`:
#
#     python=/path/to/python      # Python that has distcnn            default: .venv/bin/python here, else python3
#     container=(apptainer exec --nv image.sif)   # words before every command on a node        default: none
#     srun_flags=(--mpi=none)     # more flags for srun                                         default: none
#     launcher=torchrun           # or accelerate
#     ranks=8                     # processes a node                   default: one a GPU, one without GPUs
#     max_restarts=3              # of a node's processes after a crash, within the job
#     host_suffix=-ib             # turns a node's address into the one that the ranks shall meet at
#     run=/path/to/run            # the run folder                     default: what the flags say
#
# USR1 (`#SBATCH --signal=B:USR1@180`, or `scancel --batch --signal=USR1 JOB`): save, then queue the job again.
# TERM (`scancel JOB`, or the time limit without a USR1 before it): save; only after a time limit queue it again.
# Exit codes: 0 complete, 75 saved and to be continued, 2 a wrong flag or bad data, else a crash.
set -uo pipefail

launch=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
[[ -n ${python:-} ]] || { python=.venv/bin/python && [[ -x $python ]]; } || python=python3
container=("${container[@]+"${container[@]}"}")
srun_flags=("${srun_flags[@]+"${srun_flags[@]}"}")

say() { printf 'distcnn batch %s: %s\n' "$SLURM_JOB_ID" "$*"; }

# Flags are checked here, on one node and before anything starts: a wrong one is one line and exit code 2.
if [[ -z ${run:-} ]]; then
    run=$("${container[@]}" "$python" -m distcnn submit --where -- "$@") || exit 2
fi
mkdir -p -- "$run/logs" || exit 2
rm -f -- "$run/stop"

# Where the ranks meet: this script runs on the job's first node. Its address as SLURM itself uses it, since a node's
# name need not be a host name; a port from the job's id, so that jobs on one node differ, and the next one if it is
# taken. Below 32768, where Linux hands out no ports of its own accord.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
host=${address:-$first}${host_suffix:-}
port=$((12000 + SLURM_JOB_ID % 20000))
while (: <"/dev/tcp/$host/$port") 2>/dev/null; do port=$((port + 1)); done

restart=${SLURM_RESTART_COUNT:-0}
export DISTCNN_PYTHON=$python DISTCNN_LAUNCHER=${launcher:-torchrun} DISTCNN_RANKS=${ranks:-}
export DISTCNN_HOST=$host DISTCNN_PORT=$port DISTCNN_ID=$SLURM_JOB_ID-$restart DISTCNN_NODES=$SLURM_NNODES
export PYTHONUNBUFFERED=1 # lines reach the log when they are written; srun --unbuffered would pose as a terminal
export DISTCNN_MAX_RESTARTS=${max_restarts:-3}
unset DISTCNN_NODE # each node knows its own
printf '{"job": "%s", "array_job": "%s", "array_task": "%s", "restart": %d, "nodes": %d, "first": "%s", "time": %d}\n' \
    "$SLURM_JOB_ID" "${SLURM_ARRAY_JOB_ID:-}" "${SLURM_ARRAY_TASK_ID:-}" "$restart" "$SLURM_NNODES" "$first" \
    "$(date +%s)" >>"$run/logs/slurm.jsonl"
say "start $restart on $SLURM_JOB_NODELIST, meeting at $host:$port, run folder $run"

# A trap runs at once only while the shell waits, hence srun in the background. torchrun would not pass USR1 on: the
# ranks look for the file `stop` instead. It is written again and again, since rank 0 removes it when it starts.
asked=
ask() {
    [[ -n $asked ]] || say "$1: asking the ranks to save and stop"
    asked="$asked $1"
    [[ -n ${asker:-} ]] && return
    while :; do
        [[ -f $run/config.toml ]] && : >"$run/stop"
        sleep 1
    done &
    asker=$!
}
trap 'ask USR1' USR1
trap 'ask TERM' TERM

saved_before=$(readlink -- "$run/checkpoints/latest")
# --wait: when one node has ended, the others have a minute to end by themselves. (--kill-on-bad-exit would kill a node
# that is about to exit with 75, too.) --cpus-per-task is not inherited from sbatch since SLURM 22.05.
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --wait=60 \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "${srun_flags[@]}" \
    "${container[@]}" bash "$launch/node.sh" "$@" &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
code=$?
[[ -z ${asker:-} ]] || { kill "$asker" && wait "$asker"; } 2>/dev/null
rm -f -- "$run/stop"
# node.sh adds 100 to the codes of failures, so that the highest code, which is srun's, is 75 only if all nodes say so.
((code > 100 && code < 103)) && code=$((code - 100))

queue_again() {
    local reason idle=0
    reason=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.* Reason=\([^ ]*\).*/\1/p')
    # SLURM would requeue a cancelled job, too.
    if [[ $asked == *TERM* && $reason != TimeLimit ]]; then
        say "cancelled: saved, not queued again; the same sbatch command goes on from there"
        return
    fi
    # A job that saves without having made a step (too short a time limit) must not go round for ever.
    if [[ $(readlink -- "$run/checkpoints/latest") == "$saved_before" ]]; then
        idle=$(($(cat -- "$run/logs/idle_starts" 2>/dev/null || echo 0) + 1))
    fi
    echo "$idle" >"$run/logs/idle_starts"
    if ((idle >= 3)); then
        say "no step was made in $idle starts in a row: not queued again (a longer --time?)"
        rm -f -- "$run/logs/idle_starts"
        code=1
        return
    fi
    say "saved: queued again, goes on by itself"
    scontrol requeue "$SLURM_JOB_ID" || say "SLURM did not requeue: give the same sbatch command again"
}

say "ended with exit code $code"
((code == 75)) && queue_again
exit "$code"
