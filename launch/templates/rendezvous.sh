# The ranks rendezvous at the first node of this job, at the address that SLURM uses for it; on one node, at loopback.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=127.0.0.1
((${#nodes[@]} == 1)) || MASTER_ADDR=$(scontrol show node --oneliner "${nodes[0]:?this job has no nodes}" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR=${MASTER_ADDR:?SLURM knows no address of ${nodes[0]}}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
# srun does not inherit the option --cpus-per-task of the job.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export TOKENIZERS_PARALLELISM=false
