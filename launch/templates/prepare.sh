#!/usr/bin/env bash
# btm-scale: text to token files, for the run in @FOLDER@
@OPTIONS@
set -euo pipefail
@SETUP@
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
srun --nodes=1 --ntasks=1@CONTAINER@ \
    @PYTHON@ -m btm_scale.cli prepare @CONFIG@ --out @RUN@
