@AGAIN@

@RETRY@

# What is prepared is kept: a job whose time is over, or that lost its node, is requeued to prepare the rest.
words=() records=() # a failure is recorded for each --domain
for name in "${only[@]}"; do words+=(--domain "$name") records+=("prepare-$name"); done
stages=@RUN@/stages
is_mistake() {
    local record
    for record in "${records[@]:-prepare}"; do
        grep -qs '"mistake": true' "$stages/$record".failed-*.json && return
    done
    return 1
}

# The records of an earlier start say nothing about this one.
for record in "${records[@]:-prepare}"; do rm -f "$stages/$record".failed-*.json; done
code=0
srun --nodes=1 --ntasks=1@CONTAINER@ \
    @PYTHON@ -m btm_scale.cli prepare @CONFIG@ --out @RUN@ "${words[@]}" || code=$?
tries=@RUN@/slurm/$stage.tries
if ((code == 0)); then
    rm -f "$tries"
elif ((code != 2)) && ! is_mistake; then
    list_finished
    finished=0
    for file in "${parts[@]}"; do [[ ! -e $file ]] || finished=$((finished + 1000000)); done
    for file in "${shards[@]}"; do [[ ! -e $file ]] || finished=$((finished + 1)); done
    once_more "$stage" "$tries" "$finished"
fi
exit "$code"
