# once_more STAGE FINISHED: requeue this job, unless its stage was started too often and has FINISHED no more.
once_more() {
    local tries=@RUN@/slurm/$1.tries
    echo "$2" >> "$tries"
    if (($(grep -cFx -- "$2" "$tries") <= @RETRIES@)); then
        echo "$1 exited with code $code; the requeued job continues"
        again
        code=0
    else
        echo "$1 was started $(grep -cFx -- "$2" "$tries") times and finished nothing more: raise launch.slurm.time"
    fi
}
