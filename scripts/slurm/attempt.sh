# shellcheck shell=bash
# One attempt of a job, from its first line to the decision whether SLURM starts it again (sourced by
# the templates). The run itself saves and ends when the stop file appears; this shell makes that
# file when SLURM warns it, waits, asks how the run ended, and requeues the job a bounded number of
# times. Uses RUN_DIRECTORY, STOP_FILE, SETTINGS, PYTHON and MAX_RESTARTS.

SAVED=75 # exit code: the run was stopped and has saved, but SLURM will not start it again
RESTARTS=${SLURM_RESTART_COUNT:-0} # unset in the first attempt
ATTEMPT=$RUN_DIRECTORY/slurm/$SLURM_JOB_ID.$RESTARTS
WAS_WARNED=no

say() { echo "[$(date '+%F %T') attempt $RESTARTS] $*"; }

begin_attempt() {
    mkdir -p "$ATTEMPT"
    # An attempt that was killed may have left its own; this one has not been asked to stop.
    rm -f "$STOP_FILE"
    set_outcome_aside
    trap on_warning USR1
    SETTINGS+=("run.directory=$RUN_DIRECTORY" "run.stop_file=$STOP_FILE")
    say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST; logs of this attempt: $ATTEMPT"
}

# As sod_mcore/outcome.py does, for a run whose start does not get that far.
set_outcome_aside() {
    local ended=$RUN_DIRECTORY/ended.json
    if [ -e "$ended" ] && ! grep -q '^{"outcome": "failed"' "$ended"; then
        mv "$ended" "$RUN_DIRECTORY/ended_before.json"
    fi
    rm -f "$ended"
}

on_warning() {
    say "SLURM warns that the time ends; asking the run to save and stop"
    WAS_WARNED=yes
    touch "$STOP_FILE"
}

# await PID: the exit code of a child. A trap interrupts `wait`, so it is asked again while the child
# lives; bash still knows the code of one that has ended meanwhile.
await() {
    wait "$1" || true
    while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
    wait "$1"
}

# await_beside PID OTHER: the same, and a child that still runs when OTHER has ended is ended too.
await_beside() {
    while kill -0 "$1" 2>/dev/null && kill -0 "$2" 2>/dev/null; do sleep 1; done
    if kill -TERM "$1" 2>/dev/null; then
        say "the engines have ended before the run; see $ATTEMPT/engines-*.log"
    fi
    await "$1"
}

# end_attempt CODE: the end of the job, or of this attempt; CODE is that of the run's step.
end_attempt() {
    local outcome=$1
    case $1 in
        0 | "$SAVED") # torchrun ends with 0 also when the run was stopped
            outcome=0
            "$PYTHON" -m sod_mcore.cli outcome "${SETTINGS[@]}" || outcome=$?
            ;;
    esac
    case $outcome in
        0) say "the run has finished" ;;
        "$SAVED") requeue ;;
        *) say "the run failed with exit code $outcome and is not started again; see $ATTEMPT" ;;
    esac
    exit "$outcome"
}

# Does not return where the job is requeued.
requeue() {
    local again="the same sbatch command continues from what was saved"
    if [ "$WAS_WARNED" = no ]; then
        say "the run was stopped, but not by SLURM; not requeued: $again"
        return
    fi
    if [ "$RESTARTS" -ge "$MAX_RESTARTS" ]; then
        say "the run has saved, and was restarted $RESTARTS times (MAX_RESTARTS); not requeued: $again"
        return
    fi
    say "the run has saved; requeueing the job"
    if scontrol requeue "$SLURM_JOB_ID"; then
        sleep 60 # SLURM ends this shell; the job must not end by itself before
    fi
    say "SLURM refuses to requeue the job: $again"
}
