#!/usr/bin/env bash
# One GPU: the tests that need it, then what it trains a second. On a machine without one: a line, and exit code 2.
#
#     benchmarks/gpu.sh [--cifar FOLDER] [--model resnet50] [--batch 256] [...]     (see gpu.py --help)
#
# PYTHON names the interpreter; by default that of .venv, where there is one.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
export PYTHONPATH=$PWD

case " $* " in
*" --device cpu "*) ;;
*)
    if ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
        echo "benchmarks/gpu.sh: torch sees no GPU here ($python)" >&2
        exit 2
    fi
    REQUIRE_GPU=1 "$python" -m pytest -q tests/gpu || echo "benchmarks/gpu.sh: TESTS FAILED; measured all the same" >&2
    ;;
esac
exec "$python" benchmarks/gpu.py "$@"
