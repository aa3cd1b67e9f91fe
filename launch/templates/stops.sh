# SIGUSR1 may reach this script too (scancel --full): it waits for the running step, which saves, and starts no other.
stops=
trap 'stops=1' USR1
srun() {
    [[ -z $stops ]] || return 85
    command srun "$@"
}
