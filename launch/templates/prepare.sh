#!/usr/bin/env bash
# btm-scale: text to token files, for the run in @FOLDER@
@OPTIONS@
set -euo pipefail
@SETUP@
@STEPS@

# What is prepared is kept: a job whose time is over, or that lost its node, is requeued to prepare the rest.
code=0
srun --nodes=1 --ntasks=1@CONTAINER@ \
    @PYTHON@ -m btm_scale.cli prepare @CONFIG@ --out @RUN@ || code=$?
tries=@RUN@/slurm/prepare.tries
if ((code == 0)); then
    rm -f "$tries"
elif ((code != 2)) && ! grep -qs '"mistake": true' @RUN@/stages/prepare.failed-*.json; then
    domains=(@RUN@/data/*/fingerprint.json @RUN@/tokenizer/tokenizer_config.json)
    shards=(@RUN@/data/.*.partial/journal/shard-*)
    finished=0
    for file in "${domains[@]}"; do [[ ! -e $file ]] || finished=$((finished + 1000000)); done
    for file in "${shards[@]}"; do [[ ! -e $file ]] || finished=$((finished + 1)); done
    echo "$finished" >> "$tries"
    if (($(grep -cFx -- "$finished" "$tries") <= @RETRIES@)); then
        echo "prepare exited with code $code; the requeued job continues"
        scontrol requeue "$SLURM_JOB_ID"
        code=0
    else
        echo "prepare was started $(grep -cFx -- "$finished" "$tries") times and encoded no more text: raise launch.slurm.time"
    fi
fi
exit "$code"
