#!/bin/sh
# Two nodes of Ray on this machine with a replica on each, to try what happens when one of them dies.
#
#   deploy/two_nodes.sh up FOLDER [NAME=VALUE ...]     arguments of deploy.ray_app:build
#   deploy/two_nodes.sh kill FOLDER                    kills the second node, all of its processes at once
#   deploy/two_nodes.sh join FOLDER                    starts it again
#   deploy/two_nodes.sh down FOLDER
#
# The nodes are groups of processes; their ids are FOLDER/head.pid and FOLDER/worker.pid. The proxies listen on
# HTTP_PORT (8000) and the port after it. FOLDER is for Ray's files, must be absolute and short (its sockets have names
# of 107 bytes at most), and must not exist.
set -eu

command=${1:?up, kill, join or down}
folder=${2:?folder}
shift 2
gcs_port=${GCS_PORT:-6399}
http_port=${HTTP_PORT:-8000}

export RAY_USAGE_STATS_ENABLED=0 RAY_ADDRESS="127.0.0.1:$gcs_port"
export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deploy.ray_proxy:middlewares
# Else each proxy would use the replica of its own node alone.
export RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING=0
# Only the second node's proxy heeds it.
export RAY_SERVE_WORKER_PROXY_HTTP_PORT=$((http_port + 1))
# On a slow or busy machine a node would be declared dead while it starts.
export RAY_raylet_start_wait_time_s=180 RAY_worker_register_timeout_seconds=180
export RAY_gcs_server_request_timeout_seconds=180 RAY_health_check_timeout_ms=30000
PYTHONPATH=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH

# A node, in a process group of its own.
start() {
    name=$1
    shift
    setsid ray start --block --node-ip-address=127.0.0.1 --num-cpus=1 --object-store-memory=100000000 "$@" \
        > "$folder/$name.log" 2>&1 &
    echo $! > "$folder/$name.pid"
}

join() {
    start worker --address="127.0.0.1:$gcs_port"
}

# Ends a node with a signal; Ray's processes leave the group of the command that started them, so its descendants count.
end() {
    [ -e "$folder/$2.pid" ] || return 0
    python3 - "$1" "$(cat "$folder/$2.pid")" << 'PYTHON'
import sys

import psutil

number, pid = int(sys.argv[1]), int(sys.argv[2])
if psutil.pid_exists(pid):
    top = psutil.Process(pid)
    ended = [*top.children(recursive=True), top]
    for process in ended:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            pass
    for process in psutil.wait_procs(ended, 30)[1]:
        process.kill()
PYTHON
    rm "$folder/$2.pid"
}

case $command in
up)
    mkdir "$folder"
    start head --head --port="$gcs_port" --temp-dir="$folder/ray" --include-dashboard=false
    for _ in $(seq 180); do
        serve start --http-port "$http_port" --proxy-location EveryNode > "$folder/serve.log" 2>&1 && break
        sleep 1
    done
    join
    # A replica has a whole node, so that the second one is on the second node.
    serve run --address "127.0.0.1:$gcs_port" --non-blocking deploy.ray_app:build \
        replicas=2 num_cpus=1 targets="$folder/targets" "$@" > "$folder/serve.log" 2>&1
    echo "http://127.0.0.1:$http_port http://127.0.0.1:$((http_port + 1))"
    ;;
kill) end 9 worker ;;
join) join ;;
down)
    end 15 worker
    end 15 head
    ;;
*)
    echo "up, kill, join or down" >&2
    exit 2
    ;;
esac
