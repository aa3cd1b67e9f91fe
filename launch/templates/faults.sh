# Record a fault of each node that went down, or started again, while the last start of this job used it. A node that
# was powered down to save energy has the state POWERED_DOWN, which is not DOWN.
faults=@RUN@/slurm/faults
start=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
note_lost_nodes() {
    local last node facts seconds reason
    [[ -s $folder/nodes && -n ${SLURM_RESTART_COUNT:-} ]] || return 0
    read -r last < "$folder/nodes"
    [[ ${last%-*} == "$SLURM_JOB_ID" ]] || return 0
    seconds=$(stat -c %Y "$folder/nodes")
    while read -r node; do
        facts=$(scontrol show node --oneliner "$node" 2> /dev/null) || continue
        reason=
        [[ ! $facts =~ State=([^\ ]*\+)?(DOWN|FAIL|NOT_RESPONDING) ]] || reason=down
        [[ -n $reason || ! $facts =~ SlurmdStartTime=([^\ ]+) ]] ||
            (($(date -d "${BASH_REMATCH[1]}" +%s 2> /dev/null || echo 0) <= seconds)) || reason="started again"
        [[ -n $reason ]] || continue
        mkdir -p "$faults/$node"
        printf '{"schema": 1, "reason": "the node was lost (%s)"}\n' "$reason" > "$faults/$node/$last.json"
    done < <(tail -n +2 "$folder/nodes")
}

# Whether a rank of this start has recorded a fault of its node.
is_faulty() {
    local file
    for file in "$faults"/*/"$start.json"; do [[ ! -e $file ]] || return 0; done
    return 1
}

@AGAIN@

# requeue: this job again, without the nodes that have failed groups twice.
requeue() {
    local excluded=@EXCLUDED@ node records room=@ROOM@
    local bad=$excluded
    for node in "$faults"/*/; do
        records=("$node"*.json)
        node=$(basename "$node")
        if ((room > 0 && ${#records[@]} > 1)) && [[ ,$bad, != *",$node,"* ]]; then
            bad=${bad:+$bad,}$node room=$((room - 1))
        fi
    done
    trap '' TERM # SLURM ends this script as soon as the job is requeued
    again
    [[ $bad == "$excluded" ]] || scontrol update "jobid=$job" "excnodelist=$bad" || true
}
