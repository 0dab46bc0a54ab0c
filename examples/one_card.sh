#!/usr/bin/env bash
# One real run on one card: a 1B Llama from random weights, DPO to the end, and its export read back. Nothing is fetched:
# pairs and tokenizer are the demo's (made-up instructions whose answers a program verifies).
#
#   [MODEL=1b|tiny] [STEPS=n] [ACCELERATOR=cuda|cpu|neuron] examples/one_card.sh [key=value ...]
#
# MODEL        1b: Llama 3.2 1B's shape, about 22 GB of weights and optimizer state in bf16 (default); tiny: the demo's,
#              to try the command on a CPU
# STEPS        optimizer steps of 64 pairs (default 200)
# ACCELERATOR  default cuda
# key=value    overrides of hf_llama3_2_1B_DPO_config, e.g. precision.type=fp16
#
# Everything goes to one_card_run/ in the current folder, which is made afresh each time.
set -euo pipefail

examples=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd)
python=${NXDT_ALIGN_PYTHON:-python3}
model=${MODEL:-1b}
export NXDT_ALIGN_PYTHON=$python PYTHONPATH=$examples/../src:$examples${PYTHONPATH:+:$PYTHONPATH}
case $model in
  1b | tiny) ;;
  *)
    echo "MODEL must be 1b or tiny, but is '$model'" >&2
    exit 1
    ;;
esac

rm -rf -- one_card_run
mkdir one_card_run
cd one_card_run
out=$PWD
"$python" -m demo.prepare --out .
if [[ $model == 1b ]]; then
  "$python" -c '
import json
from pathlib import Path
from nxdt_align.models.presets import LLAMA3_2_1B
own = json.loads(Path("model_config.json").read_text())
tokens = {key: value for key, value in own.items() if key.endswith("_token_id")}
Path("model_config.json").write_text(json.dumps(LLAMA3_2_1B.to_hf_dict() | tokens))
'
fi
strategy=distributed_strategy
CONF_FILE=hf_llama3_2_1B_DPO_config TRAIN_ITERS=${STEPS:-200} "$examples/train.sh" \
  name=one_card "trainer.accelerator=${ACCELERATOR:-cuda}" trainer.devices=1 trainer.max_epochs=-1 \
  trainer.log_every_n_steps=1 \
  $strategy.engine=native $strategy.tensor_model_parallel_size=1 $strategy.sequence_parallel=False $strategy.zero1=False \
  exp_manager.resume_from_checkpoint=null exp_manager.export_hf=True "exp_manager.explicit_log_dir=$out/run" \
  model.activations_checkpoint_granularity=null "model.model_config=$out/model_config.json" \
  "data.tokenizer.type=$out/tokenizer" "data.train_dir=$out/data/train.jsonl" "data.val_dir=$out/data/heldout.jsonl" \
  data.seq_length=128 model_alignment_strategy.dpo.max_prompt_length=64 data.global_batch_size=64 "$@"
echo "the run and its export: $out/run"
