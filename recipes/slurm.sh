#!/usr/bin/env bash
# One training on several machines of a Slurm cluster, until its budget is used, however many jobs that takes:
#
#     RUN=runs/big sbatch --nodes 4 recipes/slurm.sh pretrain-osrt-v4 train.accumulate=32
#
# The arguments are those of `looplm train`. Once RUN has begun they are ignored and the run continues as it is. Two minutes
# before the time is up, and when the job has to make room, a checkpoint is written and the job queues again.
#SBATCH --job-name=looplm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
RUN=${RUN:-runs/slurm}
PORT=${PORT:-29500}

if [ -e "$RUN/config.yaml" ]; then
  words=(--resume "$RUN")
else
  words=("$@" --out "$RUN")
fi
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

is_stopping=false
# shellcheck disable=SC2317  # the trap calls it
stop() {
  is_stopping=true
  kill -TERM "$step"  # srun hands it to torchrun, and torchrun to the ranks, which stop after their step
}

# torchrun waits 30 s for the ranks by default, and a checkpoint can take longer
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv-backend=c10d --rdzv-endpoint="$first:$PORT" --rdzv-id="$SLURM_JOB_ID" --shutdown-timeout=110 \
  -m looplm train "${words[@]}" &
step=$!
trap stop TERM
status=0
wait "$step" || status=$?
if [ "$is_stopping" = true ]; then
  wait "$step" || true  # the signal ended the first wait
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
