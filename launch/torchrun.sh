#!/usr/bin/env bash
# Train with torchrun by hand, on one machine or on several that see the same files.
#
#     launch/torchrun.sh -- FLAGS                        a process a GPU of this machine (without GPUs: one)
#     launch/torchrun.sh --ranks 4 -- FLAGS              four processes
#     launch/torchrun.sh --nodes 2 --node 0 --host a --port 29500 -- FLAGS      on machine a, and at the same time
#     launch/torchrun.sh --nodes 2 --node 1 --host a --port 29500 -- FLAGS      on machine b
#
# FLAGS are those of `distcnn train`, the same on all machines. Exit code 75: stopped on request and saved; the same
# command goes on. `--max-restarts 0` ends at the first crash (default: 3 restarts).
set -euo pipefail

fail() {
    echo "torchrun.sh: $*" >&2
    exit 2
}
launch=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=${DISTCNN_PYTHON:-$launch/../.venv/bin/python}
[[ -x $python ]] || python=python3
nodes=1 node='' host='' port='' ranks='' restarts=3
while (($#)); do
    case $1 in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;;
    --) break ;;
    --nodes | --node | --port | --ranks | --max-restarts)
        [[ ${2:-} =~ ^[0-9]+$ ]] || fail "$1 needs a number"
        name=${1#--} && name=${name/max-/} && printf -v "$name" %d "$((10#$2))" && shift 2
        ;;
    --host) host=${2:-} && shift "$(($# > 1 ? 2 : 1))" ;;
    *) fail "$1 is no flag of mine; those of distcnn train stand behind --" ;;
    esac
done
[[ ${1:-} != -- ]] || shift
((nodes >= 1)) || fail "--nodes 0: at least 1"
if ((nodes > 1)); then
    [[ -n $node && -n $host && -n $port ]] || fail "several nodes need --node, --host and --port"
    ((node < nodes)) || fail "--node $node of --nodes $nodes: they count from 0"
fi
"$python" -m distcnn submit --where -- "$@" >/dev/null # flags are checked once, before any process starts

export DISTCNN_PYTHON=$python DISTCNN_NODES=$nodes DISTCNN_NODE=${node:-0} DISTCNN_HOST=${host:-127.0.0.1}
export DISTCNN_PORT=${port:-0} DISTCNN_RANKS=$ranks DISTCNN_MAX_RESTARTS=$restarts
code=0
bash "$launch/node.sh" "$@" || code=$?
exit "$((code > 100 && code < 103 ? code - 100 : code))"
