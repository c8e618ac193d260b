# shellcheck shell=bash
# Source this on every machine before a launch; edit it for your cluster. Each line may be left out.
# What is exported here reaches other machines through `vembed-ds --hostfile`, srun and mpirun -x.

# Models and data sets come from a folder that all machines share, and nobody asks the internet.
# Fill it once beforehand: hf download openai/clip-vit-base-patch32
export HF_HOME="${HF_HOME:-$PWD/.cache/huggingface}"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export TOKENIZERS_PARALLELISM=false WANDB_MODE="${WANDB_MODE:-offline}"

# DeepSpeed's compiled extensions. Without the variable every machine has a folder of its own in the
# user's cache, which is right where processors or drivers differ; a shared one is built once.
# export TORCH_EXTENSIONS_DIR=$PWD/.cache/torch_extensions

# The network of the machines, where they have several: the interface that all of them have.
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0
# InfiniBand: which adapters, and nothing else if they are all alike.
# export NCCL_IB_HCA=mlx5
# What NCCL chose, when it is slow or hangs: export NCCL_DEBUG=INFO
