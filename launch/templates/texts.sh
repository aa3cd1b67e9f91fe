#!/usr/bin/env bash
# btm-scale: the text of one big domain to token files, for the run in @FOLDER@
@OPTIONS@
set -euo pipefail
@ARRAY@
@STOPS@
models=(@MODELS@)
domain=${models[${SLURM_ARRAY_TASK_ID:-0}]}
@SETUP@
@STEPS@

stage=prepare-$domain
only=("$domain")
data=@RUN@/data
list_finished() {
    parts=("$data/$domain/fingerprint.json")
    shards=("$data/.$domain.partial/journal/shard-"*)
}
@ENCODE@
