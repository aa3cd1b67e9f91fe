# Only what this job asked for may reach its steps: the srun of an outer job leaves the cores to which it bound its task.
unset "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" SLURM_DISTRIBUTION
export SLURM_EXPORT_ENV=ALL
# sbatch in an interactive job leaves that job's memory beside this one's, and srun refuses more than one kind.
memory=("${!SLURM_MEM_PER_@}")
((${#memory[@]} < 2)) || unset "${memory[@]}"
# srun does not inherit the option --cpus-per-task of the job.
cpus=${SLURM_CPUS_PER_TASK:-@CPUS@}
[[ -z $cpus ]] || export SRUN_CPUS_PER_TASK=$cpus
# The working directory may hold Python files of others: nothing is imported from it.
export PYTHONSAFEPATH=1
