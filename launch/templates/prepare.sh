#!/usr/bin/env bash
# btm-scale: text to token files, for the run in @FOLDER@
@OPTIONS@
set -euo pipefail
@ARRAY@
@STOPS@
@SETUP@
@STEPS@

stage=prepare
only=(@DOMAINS@)
list_finished() {
    parts=(@RUN@/data/*/fingerprint.json @RUN@/tokenizer/tokenizer_config.json)
    shards=(@RUN@/data/.*.partial/journal/shard-*)
}
@ENCODE@
