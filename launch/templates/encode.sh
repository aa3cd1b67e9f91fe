@AGAIN@

# What is prepared is kept: a job whose time is over, or that lost its node, is requeued to prepare the rest.
words=()
for name in "${only[@]}"; do words+=(--domain "$name"); done
code=0
stages=@RUN@/stages
srun --nodes=1 --ntasks=1@CONTAINER@ \
    @PYTHON@ -m btm_scale.cli prepare @CONFIG@ --out @RUN@ "${words[@]}" || code=$?
tries=@RUN@/slurm/$stage.tries
if ((code == 0)); then
    rm -f "$tries"
elif ((code != 2)) && ! grep -qs '"mistake": true' "$stages/$stage".failed-*.json; then
    finished=0
    for file in "${parts[@]}"; do [[ ! -e $file ]] || finished=$((finished + 1000000)); done
    for file in "${shards[@]}"; do [[ ! -e $file ]] || finished=$((finished + 1)); done
    echo "$finished" >> "$tries"
    if (($(grep -cFx -- "$finished" "$tries") <= @RETRIES@)); then
        echo "$stage exited with code $code; the requeued job continues"
        again
        code=0
    else
        echo "$stage was started $(grep -cFx -- "$finished" "$tries") times and encoded no more text: raise launch.slurm.time"
    fi
fi
exit "$code"
