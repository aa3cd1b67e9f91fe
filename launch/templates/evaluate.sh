#!/usr/bin/env bash
# btm-scale: averages, every method's perplexity and the page, for the run in @FOLDER@
@OPTIONS@
set -euo pipefail
@SETUP@
@RENDEZVOUS@

# By ranks first, so that nothing is left for this script's own host to start: in a container there is no srun.
srun --ntasks=@RANKS@ --kill-on-bad-exit=1@CONTAINER@ \
    @PYTHON@ -m btm_scale.cli score @RUN@ --averages --launcher slurm
@ALONE@@PYTHON@ -m btm_scale.cli evaluate @RUN@ --launcher slurm
@ALONE@@PYTHON@ -m btm_scale.cli report @RUN@
