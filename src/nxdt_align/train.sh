#!/usr/bin/env bash
# Trains what a config describes, on this machine or as one node of a Slurm or MPI job.
#
#   [COMPILE=0|1] [CONF_FILE=name] [TRAIN_ITERS=n] examples/train.sh [key=value ...]
#   [COMPILE=0|1] [CONF_FILE=name] [TRAIN_ITERS=n] nxdt-align launch [key=value ...]     (the same, once installed)
#
# CONF_FILE     a config that "nxdt-align presets" lists, with or without .yaml, or a path (default
#               hf_llama3_8B_DPO_config)
# COMPILE       1: compile the run's graphs and stop: dry-run steps of every shape, which write nothing, under
#               neuron_parallel_compile on engine nxd if installed, else by torch.compile or on torch_xla's CPU device
#               (docs/compile.md)
# TRAIN_ITERS   number of steps, instead of the config's trainer.max_steps
# REFERENCE     I/N: compute the I-th of N equal shares of the run's reference log-probabilities and stop; 1/1: all of
#               them (nxdt-align reference precompute)
# LOG_PATH      folder of the log file (default nemo_experiments/logs; with a node's subfolder under Slurm and MPI)
# MASTER_ADDR, MASTER_PORT   rendezvous of a job of several nodes (default: the first node, 41000); on one node the
#               default is the first of 41000 to 41031 that is free. To keep other programs off these ports, as NxD
#               Training does off 41000: sudo sysctl -w net.ipv4.ip_local_reserved_ports=41000-41031
#               (a run on Neuron names the ports that it needs and that are not reserved)
# NXDT_ALIGN_PYTHON          interpreter (default: of the active environment, then of .venv, then python3)
# key=value     overrides of the config, e.g. trainer.max_steps=100
# --print-env   print the environment variables of the Neuron stack that the run would set, and stop
#
# Slurm:  sbatch --nodes 4 examples/slurm.sbatch, or srun with one task per node
# MPI:    mpirun --map-by ppr:1:node -x MASTER_ADDR=<first node> -x CONF_FILE examples/train.sh
# torchrun: each worker of "torchrun --no-python ... examples/train.sh" trains as the rank that it is.
#
# SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's --signal) end the run after its step, with a checkpoint from which the
# same command goes on; a second one ends it at once. examples/slurm.sbatch shows how a job is requeued.
#
# Experiments go to nemo_experiments/<name>/<date>/ under the current folder. Exits with the trainer's status.
set -euo pipefail

here=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd)
# In a checkout, the source that this script is in counts, installed or not. An installed package's, or a copy that
# someone has put beside a YAML, takes the package that the interpreter has.
checkout=
[[ $here != */src/nxdt_align ]] || checkout=${here%/src/nxdt_align}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

choose_python() {
  local candidate
  if [[ -n ${NXDT_ALIGN_PYTHON:-} ]]; then
    command -v -- "$NXDT_ALIGN_PYTHON" || fail "NXDT_ALIGN_PYTHON=$NXDT_ALIGN_PYTHON is not an executable file"
    return
  fi
  for candidate in ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} ${checkout:+"$checkout/.venv/bin/python"}; do
    if [[ -x $candidate ]]; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  command -v python3 || fail "no python3 on PATH: install one, or set NXDT_ALIGN_PYTHON"
}

# Prints the folder of the package that the interpreter would run. Found, not imported: that takes milliseconds.
find_package() {
  local probe='from importlib.util import find_spec
missing = [name for name in ("nxdt_align", "torch", "lightning", "omegaconf", "hydra") if find_spec(name) is None]
print(",".join(missing) or find_spec("nxdt_align").submodule_search_locations[0])' found
  found=$("$python" -c "$probe") || fail "$python does not run: set NXDT_ALIGN_PYTHON to another interpreter"
  [[ -d $found ]] ||
    fail "$python has no ${found//,/, }: ${checkout:+run make demo in $checkout, or }install nxdt-align there," \
      "or set NXDT_ALIGN_PYTHON to an interpreter that has it"
  printf '%s\n' "$found"
}

# Prints the absolute path of the config that CONF_FILE names.
find_config() {
  local name=${1%.yaml}.yaml candidate
  local candidates=("$package/conf/$name" "$name")
  [[ $name != */* ]] || candidates=("$name")
  for candidate in "${candidates[@]}"; do
    if [[ -f $candidate ]]; then
      printf '%s/%s\n' "$(cd -- "$(dirname -- "$candidate")" && pwd -P)" "${candidate##*/}"
      return
    fi
  done
  local known=("$package"/conf/*.yaml)
  known=("${known[@]##*/}")
  fail "CONF_FILE=$1: there is no file ${candidates[*]}. Of this package: ${known[*]%.yaml}"
}

# Sets nnodes, node_rank, master_addr and log_path for the launcher that this runs under.
find_nodes() {
  nnodes=1 node_rank=0 master_addr=${MASTER_ADDR:-} log_path=nemo_experiments/logs
  if [[ -n ${TORCHELASTIC_RUN_ID:-} ]]; then
    nnodes=${GROUP_WORLD_SIZE:-1}
    log_path+=/$TORCHELASTIC_RUN_ID/rank_${RANK:-0}
  elif [[ -n ${SLURM_NNODES:-} ]]; then
    find_slurm_nodes
  elif [[ -n ${OMPI_COMM_WORLD_RANK:-} ]]; then
    find_mpi_nodes
  fi
  log_path=${LOG_PATH:-$log_path}
}

find_slurm_nodes() {
  nnodes=${SLURM_STEP_NUM_NODES:-$SLURM_NNODES}
  node_rank=${SLURM_NODEID:-0}
  log_path+=/${SLURM_JOB_ID:?}/${SLURM_RESTART_COUNT:-0}/$node_rank
  ((nnodes > 1)) || return 0
  local tasks=${SLURM_STEP_NUM_TASKS:-${SLURM_NTASKS:-$nnodes}}
  ((tasks == nnodes)) || fail "Slurm started $tasks tasks on $nnodes nodes: use srun with --ntasks-per-node 1"
  if [[ -z $master_addr ]]; then
    local hosts
    hosts=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-}}") ||
      fail "scontrol does not list the job's nodes: set MASTER_ADDR"
    master_addr=${hosts%%$'\n'*}
  fi
  use_efa
}

find_mpi_nodes() {
  nnodes=${OMPI_COMM_WORLD_SIZE:?} node_rank=$OMPI_COMM_WORLD_RANK
  log_path+=/${POD_UID:-${PMIX_NAMESPACE:-mpi}}/$node_rank
  ((nnodes > 1)) || return 0
  ((${OMPI_COMM_WORLD_LOCAL_SIZE:-1} == 1)) ||
    fail "mpirun started $OMPI_COMM_WORLD_LOCAL_SIZE tasks on one node: use mpirun --map-by ppr:1:node"
  # NxD Training's container images bring this helper; it prints the job's hosts, the first node first.
  if [[ -z $master_addr && -x /nodelist_helper.py ]]; then
    read -r master_addr _ <<<"$(/nodelist_helper.py)"
  fi
  [[ -n $master_addr ]] ||
    fail "MPI does not say which host has rank 0: give it, mpirun -x MASTER_ADDR=<first node> ..."
  export CCOM_SOCKET_IFNAME=${CCOM_SOCKET_IFNAME:-eth0}
  use_efa
}

use_efa() {
  export FI_EFA_USE_DEVICE_RDMA=${FI_EFA_USE_DEVICE_RDMA:-1}
  export FI_PROVIDER=${FI_PROVIDER:-efa}
  export FI_EFA_FORK_SAFE=${FI_EFA_FORK_SAFE:-1}
}

# 32 workers on one node open many files; the hard limit is the most that a user may have.
raise_file_limit() {
  local wanted=65535 hard
  hard=$(ulimit -Hn)
  [[ $hard == unlimited ]] || ((hard > wanted)) || wanted=$hard
  [[ $(ulimit -Sn) == unlimited ]] || (($(ulimit -Sn) >= wanted)) || ulimit -Sn "$wanted"
}

# Sets launch to the command that starts the trainer's processes of this node.
build_launch() {
  local arguments=(--config-path "${config%/*}" --config-name "$(basename -- "$config" .yaml)" "$@")
  local processes
  launch=("$python")
  [[ $COMPILE == 0 ]] || compile_ahead "${arguments[@]}"
  if [[ -z ${TORCHELASTIC_RUN_ID:-} ]]; then
    processes=$("$python" -m nxdt_align processes "${arguments[@]}") || exit $?
    [[ $processes =~ ^[1-9][0-9]*$ ]] || fail "expected a number of processes, got: $processes"
    if ((nnodes > 1)); then
      launch+=(-m nxdt_align workers torchrun --nproc_per_node "$processes" --nnodes "$nnodes" --node_rank "$node_rank"
        --master_addr "$master_addr" --master_port "${MASTER_PORT:-41000}")
    elif ((processes > 1)); then
      # A port of its own, so that two runs on one machine do not meet; of few, so that they can be reserved.
      launch+=(-m nxdt_align workers torchrun --nproc_per_node "$processes" --local_addr localhost
        --master_addr localhost --master_port "${MASTER_PORT:-41000-41031}")
    fi
    ((nnodes * processes == 1)) || share_cores "$processes"
  fi
  if [[ -n $REFERENCE ]]; then
    launch+=(-m nxdt_align reference precompute --share "$REFERENCE" "${arguments[@]}")
  else
    launch+=(-m nxdt_align train "${arguments[@]}")
  fi
}

# neuron_parallel_compile is PyTorch/XLA's, for engine nxd. Else the trainer itself compiles the dry-run steps' graphs:
# with torch.compile, or on torch_xla's CPU device if installed.
compile_ahead() {
  local engine
  command -v neuron_parallel_compile >/dev/null || return 0
  engine=$("$python" -m nxdt_align processes --engine "$@") || exit $?
  [[ $engine != nxd ]] || launch=("$python" -m nxdt_align precompile neuron_parallel_compile "${launch[@]}")
}

# torchrun's default is one thread a worker, even where there are more cores than workers.
share_cores() {
  local each=$(($(nproc) / $1))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((each > 0 ? each : 1))}
}

# Prints this script's command, as the user could give it again.
own_command() {
  local name
  for name in CONF_FILE TRAIN_ITERS REFERENCE; do
    [[ -z ${!name:-} ]] || printf '%s=%q ' "$name" "${!name}"
  done
  printf '%q' "$0"
  (($# == 0)) || printf ' %q' "$@"
}

# Runs the arguments as a command, its output to the terminal and to the file $1; returns its status.
run_logged() {
  local log_file=$1 log tee_pid child target interrupted status
  shift
  exec {log}> >(exec tee -ia -- "$log_file")
  tee_pid=$!
  set -m # a process group of its own, which a Ctrl-C does not reach by itself
  "$@" </dev/null >&"$log" 2>&1 {log}>&- &
  child=$!
  set +m
  # The trainer hands signals on to what it has started; the compiler does not.
  target=$child
  [[ $COMPILE == 0 ]] || target=-$child
  for signal in INT TERM HUP USR1; do
    # shellcheck disable=SC2064 # the child and the signal are those of now
    trap "interrupted=1; kill -s $signal -- $target 2>/dev/null || true" "$signal"
  done
  while :; do
    interrupted=0 status=0
    wait "$child" || status=$?
    ((interrupted)) || break
  done
  exec {log}>&-
  wait "$tee_pid" || true # the log's last lines
  return "$status"
}

# nxdt-align reads these two.
# Threads that wait must sleep: spinning ones make a run several times slower beside any other busy process.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
export COMPILE=${COMPILE:-0} TRAIN_ITERS=${TRAIN_ITERS:-}
REFERENCE=${REFERENCE:-}
[[ $COMPILE == [01] ]] || fail "COMPILE must be 0 or 1, but is '$COMPILE'"
[[ $COMPILE == 0 || -z $REFERENCE ]] || fail "COMPILE=1 compiles a training run's graphs, and REFERENCE computes: give one"
python=$(choose_python)
[[ -z $checkout ]] || export PYTHONPATH=$checkout/src${PYTHONPATH:+:$PYTHONPATH}
package=$(find_package)
config=$(find_config "${CONF_FILE:-hf_llama3_8B_DPO_config}")
find_nodes
export PYTHONUNBUFFERED=1
# As NxD Training sets them.
export MALLOC_ARENA_MAX=${MALLOC_ARENA_MAX:-128} XLA_DISABLE_FUNCTIONALIZATION=${XLA_DISABLE_FUNCTIONALIZATION:-0}
for argument in "$@"; do
  [[ $argument != --print-env ]] ||
    exec "$python" -m nxdt_align train --config-path "${config%/*}" \
      --config-name "$(basename -- "$config" .yaml)" "trainer.num_nodes=$nnodes" "$@"
done
NXDT_ALIGN_COMMAND=$(own_command "$@")
export NXDT_ALIGN_COMMAND
raise_file_limit
build_launch "trainer.num_nodes=$nnodes" "$@"
mkdir -p -- "$log_path"
printf 'Log: %s\n' "$log_path/log"
run_logged "$log_path/log" "${launch[@]}"
