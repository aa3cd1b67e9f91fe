# The id of the last task of an array is that of the array: with it, SLURM would requeue every task.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}
again() {
    scontrol requeue "$job" && return
    echo "SLURM does not requeue this job: repeat the command that submitted it, and it resumes" >&2
    exit 1
}
