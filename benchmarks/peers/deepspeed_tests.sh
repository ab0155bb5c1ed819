#!/usr/bin/env bash
# DeepSpeed's own ZeRO-3 tests on the CPU: as they are, and through lisa_ds.initialize with every block sampled, by both optimizers.
#
#   benchmarks/peers/deepspeed_tests.sh OUT [CHECKOUT]
#
# OUT is a new folder for logs and results; CHECKOUT a checkout of DeepSpeed, or else one is cloned into OUT, of TAG (v0.19.5).
# TESTS names other files or ids, relative to its tests/; TIMEOUT is what a test may take, in seconds (180).
set -euo pipefail

out=$(mkdir -p "$1" && cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
checkout=${2:-$out/DeepSpeed}
if [ ! -d "$checkout" ]; then
    git clone --quiet --depth 1 --branch "${TAG:-v0.19.5}" https://github.com/deepspeedai/DeepSpeed "$checkout"
fi
cd "$checkout/tests"
tests=${TESTS:-unit/v1/zero/test_zero.py unit/runtime/zero/test_zero_tensor_fragment.py unit/checkpoint/test_zero_optimizer.py}

# LOCAL_SIZE is how many devices DeepSpeed believes the CPU to be; its tests take up to four.
export DS_ACCELERATOR=cpu LOCAL_SIZE=8 OMP_NUM_THREADS=1 DS_UNITTEST_TIMEOUT=${TIMEOUT:-180}
export PYTHONPATH=$PWD:$here:$here/../..${PYTHONPATH:+:$PYTHONPATH}
for through in stock masked_adamw adamw; do
    export THROUGH=$through ENGINES=$out/$through.engines
    : >"$ENGINES"
    # shellcheck disable=SC2086
    python -m pytest -p through_lisa -p no:cacheprovider --basetemp="$out/$through" --junitxml="$out/$through.xml" $tests \
        >"$out/$through.log" 2>&1 || true # what fails is in the table
done
python "$here/deepspeed_table.py" "$out"
