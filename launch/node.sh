#!/usr/bin/env bash
# One node's share of a run: start its ranks with torchrun or `accelerate launch`, wait, and say how they ended.
#
#     node.sh FLAGS OF distcnn train
#
# Its settings come in the environment, from batch.sh or torchrun.sh; what differs from node to node is found out here:
#
#     DISTCNN_NODES, DISTCNN_NODE   how many nodes, and which this is (default: what srun says, else the only one)
#     DISTCNN_HOST, DISTCNN_PORT    where the ranks meet; node 0 listens there (one node: any free port)
#     DISTCNN_ID                    a name for this start of the run
#     DISTCNN_RANKS                 processes on this node (default: one a GPU, or one)
#     DISTCNN_LAUNCHER              torchrun or accelerate
#     DISTCNN_MAX_RESTARTS          how often a crash restarts the ranks
#     DISTCNN_GRACE                 seconds for torchrun to end or to restart ranks that have ended (default: 120)
#     DISTCNN_PYTHON                Python that has distcnn
#
# Exit codes: 0 complete, 75 stopped on request and saved, 102 a wrong flag or bad data, else 101.
set -uo pipefail

# Only the ranks themselves answer to these; torchrun and the shells must outlive the save that they ask for.
trap '' TERM USR1 USR2
export PET_SIGNALS_TO_HANDLE=SIGINT # torchrun's flags by environment, which accelerate's use of torchrun knows, too

# A store of its own for each start of the ranks. In torchrun's shared one a restarted rank may find the address that a
# dead one has left there, and fails (seen with torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

launch=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=${DISTCNN_PYTHON:-python3}
nodes=${DISTCNN_NODES:-1}
node=${DISTCNN_NODE:-${SLURM_NODEID:-0}}
host=${DISTCNN_HOST:-127.0.0.1}
port=${DISTCNN_PORT:-0}
restarts=${DISTCNN_MAX_RESTARTS:-3}
grace=${DISTCNN_GRACE:-120}
export PET_RDZV_ID=${DISTCNN_ID:-distcnn}

gpus_here() { nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU'; }
ranks=${DISTCNN_RANKS:-${SLURM_GPUS_ON_NODE:-$(gpus_here)}}
((ranks > 0)) || ranks=1
cores=$(nproc) # those that this task may use
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}

# Several nodes: the address and the interface by which this one reaches the host. Left alone, gloo takes the address
# that the host name resolves to, which on many systems is 127.0.1.1; NCCL needs the interface for its first contact,
# and uses InfiniBand or RoCE for the data as before.
if ((nodes > 1)); then
    read -r address interface < <("$python" -m distcnn.network "$host")
    [[ -n ${address:-} ]] || exit 102
    export PET_LOCAL_ADDR=$address
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
fi
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}                         # a network that fails says why
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}     # the last collectives, dumped when one times out:
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1} # they tell which rank did not come

verdicts=$(mktemp -d) || exit 101
trap 'rm -rf -- "$verdicts"' EXIT
export DISTCNN_VERDICTS=$verdicts DISTCNN_PYTHON=$python
worker=(bash "$launch/worker.sh" "$@")

meet="is_host=$((node == 0))" # said, not guessed: torchrun's guess from host names goes wrong with several names
case ${DISTCNN_LAUNCHER:-torchrun} in
torchrun)
    command=("$python" -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$ranks"
        --rdzv-backend=c10d --rdzv-endpoint="$host:$port" --rdzv-conf="$meet" --max-restarts="$restarts" --no-python)
    ;;
accelerate)
    # --multi_gpu means "by torchrun", with or without GPUs; a single process needs none of it.
    command=("$python" -m accelerate.commands.launch --num_processes="$((nodes * ranks))" --num_machines="$nodes"
        --mixed_precision=no --dynamo_backend=no --no_python)
    ((nodes * ranks == 1)) || command+=(--multi_gpu --machine_rank="$node" --main_process_ip="$host"
        --main_process_port="$port" --rdzv_backend=c10d --rdzv_conf="$meet" --max_restarts="$restarts")
    ;;
*)
    echo "node.sh: DISTCNN_LAUNCHER=$DISTCNN_LAUNCHER: torchrun or accelerate" >&2
    exit 102
    ;;
esac
"${command[@]}" "${worker[@]}" &
agent=$!

# A rank that has ended leaves a note, and takes it away when it is started again. Where a note stays, torchrun waits in
# vain: for other nodes at the end (up to five minutes), or for an answer over a network that has broken.
(
    waited=0
    while ((waited < grace)); do
        sleep 1
        compgen -G "$verdicts/*" >/dev/null && waited=$((waited + 1)) || waited=0
    done
    kill -INT "$agent" && sleep 10
    for rank in $(pgrep -P "$agent"); do kill -KILL -- "-$rank"; done # each rank leads a group of its own
    kill -KILL "$agent"
) >/dev/null 2>&1 &
watcher=$!
disown "$watcher"

trap : INT # torchrun has it as well and passes it on
while kill -0 "$agent" 2>/dev/null; do wait "$agent"; done
wait "$agent"
code=$?
kill -KILL "$watcher" 2>/dev/null

# What the ranks said goes before torchrun's code, which is 1 for everything.
said=$(cat -- "$verdicts"/* 2>/dev/null | sort -u)
((code == 0)) && [[ -z $said ]] && exit 0
[[ $said == 75 && $(cat -- "$verdicts"/* | wc -l) -eq $ranks ]] && exit 75
[[ $said == 2 ]] && exit 102
exit 101
