#!/bin/bash
# Two nodes with four accelerators each: sbatch docs/launch/slurm.sh my-recipe.yaml /shared/out
# The recipe, the base model and the output folder have to lie where all nodes see them.
#SBATCH --job-name=pica
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120   # two minutes before the end: the run writes a checkpoint, and --resume goes on from it
set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc_per_node 4 \
    --rdzv_id "$SLURM_JOB_ID" \
    --rdzv_backend c10d \
    --rdzv_endpoint "$first:29500" \
    -m pica train "$1" -o "$2"
