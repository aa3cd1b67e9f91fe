#!/usr/bin/env bash
# btm-scale: averages, every method's perplexity and the page, for the run in @FOLDER@
@OPTIONS@
set -euo pipefail
@ARRAY@
@STOPS@
@SETUP@
@RENDEZVOUS@

@AGAIN@

@RETRY@

# Score in ranks first, so that this script's host has nothing to start: a container has no srun.
code=0
rm -f @RUN@/train/score/stopped
group @RUN@/train/score/log score @RUN@ --averages || code=$?
if ((code == 0)); then
    @ALONE@@PYTHON@ -m btm_scale.cli evaluate @RUN@ --launcher slurm || code=$?
fi
if ((code == 0)); then
    @ALONE@@PYTHON@ -m btm_scale.cli report @RUN@ || code=$?
fi

# Scored texts are kept, so a job that was stopped because its time is over is requeued to score the rest.
tries=@RUN@/slurm/evaluate.tries
if ((code == 0)); then
    rm -f "$tries"
elif ((code == 85)) || [[ -e @RUN@/train/score/stopped ]]; then
    once_more evaluate "$tries" "$(find @RUN@/scores -type f 2> /dev/null | wc -l)"
fi
exit "$code"
