#!/usr/bin/env bash
# btm-scale: one model by one group, for the run in @FOLDER@
@OPTIONS@
set -euo pipefail
models=(@MODELS@)
model=${models[${SLURM_ARRAY_TASK_ID:-0}]}
folder=@RUN@/train/$model
@SETUP@
@RENDEZVOUS@

# Each rank writes its own log in the model's folder. If a rank is lost, srun ends the group.
code=0
mkdir -p "$folder"
rm -f "$folder/stopped"
group "$folder/log" train @CONFIG@ --out @RUN@ --model "$model" || code=$?

if [[ -e $folder/stopped ]]; then
    echo "$model saved a checkpoint before its time limit; the requeued job resumes it"
    rm -f "$folder"/log.failed-*.json
    scontrol requeue "$SLURM_JOB_ID"
    code=0
elif ((code == 0)); then
    rm -f "$folder/lost"
elif ((code != 2)) && ! grep -qs '"mistake": true' "$folder"/log.failed-*.json; then
    # A node or a rank was lost. (Exit code 2 is a mistake in the config; if one rank reports it first, srun ends the
    # others and returns their code.) The requeued job resumes from the newest checkpoint. A model that keeps failing at
    # the same checkpoint is not requeued.
    state=$(find "$folder/checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null | sort | tail -n 1) || true
    echo "${state##*/}" >> "$folder/lost"
    if (($(grep -cFx -- "${state##*/}" "$folder/lost") <= @RETRIES@)); then
        echo "$model exited with code $code; the requeued job resumes from ${state:-the start}"
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
