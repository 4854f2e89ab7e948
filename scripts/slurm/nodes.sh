# shellcheck shell=bash
# Steps of a job over several nodes (sourced by the templates after attempt.sh): engines on some
# nodes, one process beside this shell that routes to all of them, ranks on some nodes.
#
# What `serving:` describes runs on each engine node. Each of these nodes writes the addresses of its
# engines into a folder of this attempt, so that those of an earlier attempt cannot be mistaken for
# them. Uses what the templates set.

# Not `| head -n 1`, which ends scontrol with a SIGPIPE now and then, and with it the job.
mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD_NODE=${NODES[0]}
RENDEZVOUS_PORT=$((20000 + SLURM_JOB_ID % 10000))
ENGINES=   # process of the engines' step
ADDRESSES=() # settings that tell the routing process where the engines are

# step NAME FIRST COUNT: sets STEP to a command that runs its arguments once on each of COUNT nodes,
# from node FIRST (0-based) on. --overlap: steps may share a node; the second would wait otherwise.
step() {
    STEP=(srun --overlap --job-name="$1" --relative="$2" --nodes="$3" --ntasks="$3"
        --ntasks-per-node=1 --kill-on-bad-exit=1 --output="$ATTEMPT/$1-%t.log")
}

check_shared_folder() {
    step folder-check 0 "$SLURM_JOB_NUM_NODES"
    if ! "${STEP[@]}" test -d "$ATTEMPT"; then
        say "error: RUN_DIRECTORY is $RUN_DIRECTORY, which not every node sees; use a shared folder"
        exit 2
    fi
}

# start_engines FIRST COUNT: start them on COUNT nodes and wait until all answer.
start_engines() {
    local folders=() index
    for ((index = 0; index < $2; index++)); do folders+=("$ATTEMPT/engines-$index"); done
    step engines "$1" "$2"
    # shellcheck disable=SC2016 # expanded on the node, which alone knows its name
    "${STEP[@]}" bash -c 'exec "$@" serving.port=0 "serving.host=$SLURMD_NODENAME" \
        "serving.directory=$0/engines-$SLURM_PROCID"' \
        "$ATTEMPT" "$PYTHON" -m sod_mcore.serving "${SETTINGS[@]}" &
    ENGINES=$!
    "$PYTHON" -m sod_mcore.cli wait-for-engines --timeout "$ENGINE_START_SECONDS" \
        "${folders[@]}" >"$ATTEMPT/addresses" &
    local code=0
    await_beside $! "$ENGINES" || code=$?
    if [ "$code" != 0 ]; then
        stop_engines
        end_attempt "$code"
    fi
    mapfile -t ADDRESSES <"$ATTEMPT/addresses"
    SETTINGS+=("serving.directory=$ATTEMPT")
}

# train FIRST COUNT: ranks on COUNT nodes, inside the routing process where there are engines.
train() {
    local routing=()
    if [ -n "$ENGINES" ]; then
        routing=("$PYTHON" -m sod_mcore.serving "${SETTINGS[@]}" "${ADDRESSES[@]}"
            "serving.host=$HEAD_NODE" --)
    fi
    step trainer "$1" "$2"
    # shellcheck disable=SC2016 # expanded on the node
    "${routing[@]}" "${STEP[@]}" env "${TRAINER_ENVIRONMENT[@]}" bash -c \
        'exec "$0" -m torch.distributed.run --local-addr "$SLURMD_NODENAME" "$@"' \
        "$PYTHON" --nnodes "$2" --nproc-per-node "$RANKS_PER_NODE" --max-restarts 0 \
        --shutdown-timeout 600 --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID.$RESTARTS" \
        --rdzv-endpoint "$HEAD_NODE:$RENDEZVOUS_PORT" "$REPOSITORY/pretrain_sod.py" \
        "${SETTINGS[@]}" &
    if [ -n "$ENGINES" ]; then await_beside $! "$ENGINES"; else await $!; fi
}

# Engines end in order at SIGUSR2, which srun passes on; of a SIGTERM it would make a SIGKILL.
stop_engines() {
    [ -n "$ENGINES" ] || return 0
    kill -USR2 "$ENGINES" 2>/dev/null || true
    await "$ENGINES" || true
}
