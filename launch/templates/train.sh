#!/usr/bin/env bash
# btm-scale: one model by one group, for the run in @FOLDER@
@OPTIONS@
set -euo pipefail
models=(@MODELS@)
model=${models[${SLURM_ARRAY_TASK_ID:-0}]}
folder=@RUN@/train/$model
@SETUP@
@RENDEZVOUS@

# Each rank keeps a log of its own in the model's folder. Of a group that has lost one rank nothing goes on.
code=0
mkdir -p "$folder"
rm -f "$folder/stopped" "$folder"/log.failed-*.json
srun --ntasks=@RANKS@ --kill-on-bad-exit=1@CONTAINER@ \
    @PYTHON@ -m btm_scale.cli train @CONFIG@ --out @RUN@ --model "$model" --launcher slurm || code=$?

if [[ -e $folder/stopped ]]; then
    echo "$model has kept what is done before its time was over; it goes on in the next job"
    scontrol requeue "$SLURM_JOB_ID"
    code=0
elif [[ $code -ne 0 && $code -ne 2 ]] && ! grep -qs '"mistake": true' "$folder"/log.failed-*.json; then
    # A node or a rank was lost (2 would be a mistake in the config; if one rank tells of it before the others, srun
    # ends these, and has their code). It goes on from its newest state, but a model that fails again and again at the
    # same state is given up.
    state=$(find "$folder/checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null | sort | tail -n 1) || true
    echo "${state##*/}" >> "$folder/lost"
    if (($(grep -cFx -- "${state##*/}" "$folder/lost") <= @RETRIES@)); then
        echo "$model ended with $code; it goes on from ${state:-its beginning}"
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
