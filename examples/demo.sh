#!/usr/bin/env bash
# The demo behind "make demo" and "make demo-orpo": warms a small model up on made-up instructions whose
# answers a program can verify, aligns it, and shows on held-out instructions what that gained.
#
#   examples/demo.sh [dpo|orpo] [MODEL] [lora]
#
# MODEL is the model's family: llama (the default), mistral, qwen2, qwen3, phi3, olmo2, gemma2, gemma3 (or gemma).
# lora trains adapters instead of every weight, on the same pairs in the same steps.
# Everything goes to demo_run/ in the current folder, which is made afresh each time.
set -euo pipefail

examples=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
repo=$(dirname -- "$examples")
objective=${1:-dpo}
# Part of the experiments' names in the tiny configs.
export NXDT_DEMO_MODEL=${2:-llama}
peft=${3:-}
case $objective in
  dpo | orpo) ;;
  *)
    echo "usage: demo.sh [dpo|orpo] [MODEL] [lora], not '$objective'" >&2
    exit 1
    ;;
esac
# Of a small Llama whose every weight takes 2e-5: factors, of which one starts at 0, take a higher one.
overrides=()
case $peft in
  '') ;;
  lora)
    adapters=model_alignment_strategy.peft
    overrides=("$adapters.target_modules=[all-linear]" "$adapters.rank=16" "$adapters.alpha=32" "$adapters.dropout=0"
      model.optim.lr=1e-4)
    ;;
  *)
    echo "PEFT must be lora, or left out to train every weight, but is '$peft'" >&2
    exit 1
    ;;
esac
case $NXDT_DEMO_MODEL in
  llama | mistral | qwen2 | qwen3 | phi3 | olmo2 | gemma2 | gemma3 | gemma) ;;
  *)
    echo "MODEL must be one of llama, mistral, qwen2, qwen3, phi3, olmo2, gemma2 and gemma3," \
      "but is '$NXDT_DEMO_MODEL'" >&2
    exit 1
    ;;
esac
config=tiny_llama_${objective^^}_config
python=${NXDT_ALIGN_PYTHON:-python3}
export NXDT_ALIGN_PYTHON=$python PYTHONPATH=$repo/src:$examples${PYTHONPATH:+:$PYTHONPATH}

say() {
  printf '\n== %s\n' "$*"
}

# Prints the newest experiment folder of the objective $1; dates sort.
experiment_of() {
  local folders=(nemo_experiments/"tiny_${NXDT_DEMO_MODEL}_${1^^}"/*/)
  printf '%s\n' "${folders[-1]%/}"
}

rm -rf -- demo_run
mkdir demo_run
cd demo_run
# Where the tiny configs look for their files.
export NXDT_DEMO_DIR=$PWD
# Threads that wait must sleep: spinning ones make a run several times slower beside any other busy process.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

say "Making a tokenizer, a model and preference pairs"
"$python" -m demo.prepare --out . --model "$NXDT_DEMO_MODEL"

say "Warming the model up (supervised fine-tuning)"
CONF_FILE=tiny_llama_SFT_config "$examples/train.sh"
ln -s "$(experiment_of sft)/hf_export" warmup

say "Aligning it: CONF_FILE=$config examples/train.sh${overrides[*]:+ ${overrides[*]}}"
CONF_FILE=$config "$examples/train.sh" ${overrides[@]+"${overrides[@]}"}
aligned=$(experiment_of "$objective")

say "What it gained, on held-out instructions"
"$python" -m demo.report --before warmup --after "$aligned/hf_export" --data data \
  --objective "$objective" --model "$NXDT_DEMO_MODEL" --tensorboard "$aligned" --checkpoint "$aligned/checkpoints"
