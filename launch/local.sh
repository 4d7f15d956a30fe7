#!/usr/bin/env bash
# Train on this machine with `accelerate launch`: on all GPUs, on one, or on the CPU.
#
#     launch/local.sh FLAGS                   FLAGS are those of `distcnn train`
#     PROCESSES=2 launch/local.sh FLAGS       so many processes (default: one a GPU; on the CPU: one)
#
# It picks one of launch/accelerate/*.yaml; give your own with CONFIG=file.yaml.
set -euo pipefail

launch=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=${DISTCNN_PYTHON:-$launch/../.venv/bin/python}
[[ -x $python ]] || python=python3
gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | grep -c '^GPU' || true)
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}
case $gpus,$processes in
0,*) kind=cpu ;;
*,1) kind=gpu ;;
*) kind=gpus ;;
esac
exec "$python" -m accelerate.commands.launch --config_file "${CONFIG:-$launch/accelerate/$kind.yaml}" \
    --num_processes "$processes" "$launch/../train.py" "$@"
