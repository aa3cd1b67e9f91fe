@STEPS@
export OMP_NUM_THREADS=${cpus:-1}
export TOKENIZERS_PARALLELISM=false
# The ranks rendezvous at the first node of this job, at the address that SLURM uses for it; on one node, at loopback.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=127.0.0.1
((${#nodes[@]} == 1)) || MASTER_ADDR=$(scontrol show node --oneliner "${nodes[0]:?this job has no nodes}" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR=${MASTER_ADDR:?SLURM knows no address of ${nodes[0]}}
# Each start has another port, on which no process of this host, the first node, listens.
export MASTER_PORT=$((20000 + (7 * SLURM_JOB_ID + 1009 * ${SLURM_RESTART_COUNT:-0}) % 10000))
next_port() {
    MASTER_PORT=$((20000 + (MASTER_PORT + 1) % 10000))
    while (: < "/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2> /dev/null; do MASTER_PORT=$((20000 + (MASTER_PORT + 1) % 10000)); done
}

# group LOG WORD...: start a group of ranks; once more if another process has taken its port by then.
group() {
    local log=$1 code
    for _ in 1 2 3 4; do
        next_port
        code=0
        rm -f "$log".failed-*.json
        srun --ntasks=@RANKS@ --kill-on-bad-exit=1@CONTAINER@ @PYTHON@ -m btm_scale.cli "${@:2}" --launcher slurm || code=$?
        if ((code == 0)) || ! grep -qs '"port_taken": true' "$log".failed-*.json; then break; fi
    done
    return "$code"
}
