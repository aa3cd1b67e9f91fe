#!/usr/bin/env bash
# btm-scale: averages, every method's perplexity and the page, for the run in @FOLDER@
@OPTIONS@
set -euo pipefail
@SETUP@
@RENDEZVOUS@

# Score in ranks first, so that this script's host has nothing to start: a container has no srun.
group @RUN@/train/score/log score @RUN@ --averages
@ALONE@@PYTHON@ -m btm_scale.cli evaluate @RUN@ --launcher slurm
@ALONE@@PYTHON@ -m btm_scale.cli report @RUN@
