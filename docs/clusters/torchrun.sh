#!/bin/bash
# Two machines, the same line on both, the first one's address in it:  docs/clusters/torchrun.sh 10.0.0.1 my_run
# All GPUs of each; after a lost host both start again, up to 10 times, from the last checkpoint.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else a restart meets what the lost processes have left
torchrun --nnodes=2 --nproc-per-node="${GPUS:-gpu}" --max-restarts=10 \
    --rdzv-backend=c10d --rdzv-endpoint="$1:29400" --rdzv-id="$2" --rdzv-conf=read_timeout=600 \
    -- train.py fit --config configs/cifar10_resnet9.yaml --config configs/hardware/gpus.yaml \
    --data.data_dir="${DATA:-data}" --trainer.num_nodes=2 --run="$2"
