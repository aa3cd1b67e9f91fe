#!/usr/bin/env bash
# btm-scale: one model by one group, for the run in @FOLDER@
@OPTIONS@
set -euo pipefail
@ARRAY@
@STOPS@
models=(@MODELS@)
model=${models[${SLURM_ARRAY_TASK_ID:-0}]}
folder=@RUN@/train/$model
@SETUP@
@RENDEZVOUS@

@FAULTS@

# Each rank writes its own log in the model's folder. If a rank is lost, srun ends the group.
code=0
mkdir -p "$folder"
note_lost_nodes
printf '%s\n' "$start" "${nodes[@]}" > "$folder/nodes"
rm -f "$folder/stopped"
group "$folder/log" train @CONFIG@ --out @RUN@ --model "$model" || code=$?

if [[ -e $folder/stopped ]]; then
    echo "$model saved a checkpoint before its time limit; the requeued job resumes it"
    rm -f "$folder"/log.failed-*.json "$folder/nodes"
    requeue
    code=0
elif ((code == 0)); then
    rm -f "$folder/lost" "$folder/nodes"
elif is_faulty || { ((code != 2)) && ! grep -qs '"mistake": true' "$folder"/log.failed-*.json; }; then
    # A node, a GPU or a rank was lost. (Exit code 2 is a mistake in the config; if one rank reports it first, srun ends the
    # others and returns their code.) The requeued job resumes from the newest checkpoint. A model that keeps failing at
    # the same checkpoint is not requeued.
    state=$(find "$folder/checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null | sort | tail -n 1) || true
    echo "${state##*/}" >> "$folder/lost"
    if (($(grep -cFx -- "${state##*/}" "$folder/lost") <= @RETRIES@)); then
        echo "$model exited with code $code; the requeued job resumes from ${state:-the start}"
        requeue
    else
        rm -f "$folder/nodes"
    fi
else
    rm -f "$folder/nodes"
fi
exit "$code"
