# once_more STAGE TRIES FINISHED: requeue this job, unless its stage was started too often at the same FINISHED, the
# number of its completed parts. The file TRIES has that number for each start.
once_more() {
    echo "$3" >> "$2"
    if (($(grep -cFx -- "$3" "$2") <= @RETRIES@)); then
        echo "$1 exited with code $code; the requeued job continues"
        again
        code=0
    else
        echo "$1 was started $(grep -cFx -- "$3" "$2") times without completing more: raise launch.slurm.time"
    fi
}
