#!/usr/bin/env bash
# The same steps of one config on CPU processes and on this machine's accelerator, and how far apart they end: loss and
# gradient norm at each step, and the weights. What to do first on a machine that nobody has trained on.
#
#   CONF_FILE=name [STEPS=20] [PROCESSES=n] [TWIN=neuron] examples/parity.sh [key=value ...]
#
# CONF_FILE    as for train.sh
# STEPS        optimizer steps of each run (default 20)
# PROCESSES    of each run, one per device (default 1)
# TWIN         accelerator of the second run (default: the one that torch finds here; without one the script stops, and
#              TWIN=neuron says why, TWIN=cpu compares CPU with CPU)
# TWIN_OVERRIDES   "key=value ..." for the second run alone: what the CPU does not have, as data.attention=nki
# TOLERANCES   loss, gradient norm and weights, relative, "1e-4 1e-3 1e-3" (default: by precision.type of the config)
# key=value    overrides for both runs. A model of the real widths with few layers is enough, which starts from random
#              weights: model.num_layers=2 exp_manager.resume_from_checkpoint=null
#
# Everything goes to parity_run/ in the current folder, which is made afresh each time. Status 1 where they differ.
set -euo pipefail

here=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd)
: "${CONF_FILE:?CONF_FILE must name a config, as for train.sh}"
export CONF_FILE TRAIN_ITERS=${STEPS:-20}
out=$PWD/parity_run
# That of both runs, as train.sh chooses it.
for python in ${NXDT_ALIGN_PYTHON:+"$NXDT_ALIGN_PYTHON"} ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} \
  "$here/../.venv/bin/python" python3; do
  ! command -v -- "$python" >/dev/null || break
done
export NXDT_ALIGN_PYTHON=$python

twin=${TWIN:-auto}
if [[ $twin == auto ]]; then
  twin=$("$python" -c 'import torch
found = torch.accelerator.current_accelerator(check_available=True)
print("" if found is None else found.type)')
  if [[ -z $twin ]]; then
    printf 'error: torch finds no accelerator here: TWIN=neuron says why, TWIN=cpu compares CPU with CPU\n' >&2
    exit 1
  fi
fi
read -ra of_twin <<<"${TWIN_OVERRIDES:-}"

rm -rf -- "$out"
run_on() {
  local accelerator=$1 folder=$2
  shift 2
  printf '\n== %s steps on %s, %s process(es)\n' "$TRAIN_ITERS" "$accelerator" "${PROCESSES:-1}"
  "$here/train.sh" distributed_strategy.engine=native "trainer.accelerator=$accelerator" \
    "trainer.devices=${PROCESSES:-1}" trainer.num_nodes=1 trainer.log_every_n_steps=1 \
    exp_manager.log_gradient_norm=True exp_manager.export_hf=True exp_manager.check_export=False \
    "exp_manager.explicit_log_dir=$folder" "$@"
}
run_on cpu "$out/cpu" "$@"
run_on "$twin" "$out/twin" "$@" "${of_twin[@]}"
printf '\n== %s on cpu against %s\n' "$CONF_FILE" "$twin"
# shellcheck disable=SC2086 # three numbers
PYTHONPATH=$here/../src${PYTHONPATH:+:$PYTHONPATH} "$python" "$here/../scripts/compare_runs.py" \
  "$out/cpu" "$out/twin" ${TOLERANCES:+--tolerances $TOLERANCES}
