#!/usr/bin/env bash
# btm-scale: averages, every method's perplexity and the page, for the run in @FOLDER@
@OPTIONS@
set -euo pipefail
@SETUP@
@RENDEZVOUS@

@PYTHON@ -m btm_scale.cli evaluate @RUN@ --launcher slurm
@PYTHON@ -m btm_scale.cli report @RUN@
