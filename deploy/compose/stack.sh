# shellcheck shell=sh
# Sourced by the scripts beside it: which stack they work on, and the ways to its containers and volumes.
#
# The stack is the one that Compose itself would choose in the repository's root: by COMPOSE_PROJECT_NAME,
# COMPOSE_PROFILES, COMPOSE_FILE, and COMPOSE_ENV_FILES (one file) instead of .env. Compose 2 and Compose 1 both do; the
# second does not know COMPOSE_ENV_FILES by itself. Nothing else than Docker with Compose is needed.

say() { printf '%s\n' "$*" >&2; }
die() {
    say "$*"
    exit 1
}

env_file=${COMPOSE_ENV_FILES:-}
case $env_file in
    *,*) die "COMPOSE_ENV_FILES=$env_file names several files, and these scripts take one. Fix: put them into one." ;;
    "" | /*) ;;
    *) env_file=$PWD/$env_file ;;
esac
unset COMPOSE_ENV_FILES
[ -z "$env_file" ] || [ -r "$env_file" ] ||
    die "$env_file cannot be read. Fix: let COMPOSE_ENV_FILES name the stack's file."

if docker compose version >/dev/null 2>&1; then
    compose() { docker compose ${env_file:+--env-file "$env_file"} "$@"; }
elif docker-compose version >/dev/null 2>&1; then
    compose() { docker-compose ${env_file:+--env-file "$env_file"} "$@"; }
else
    die "Neither 'docker compose' nor 'docker-compose' runs here. Fix: install Docker with Compose."
fi
docker info >/dev/null 2>&1 || die "The Docker engine does not answer. Fix: start it, or get the right to use it."

# Its output only where it fails: Compose tells of every container.
quietly() {
    if ! output=$("$@" 2>&1); then
        say "$output"
        return 1
    fi
}

label=com.docker.compose

# The id of the stack's postgres container, where it runs; and from it the project's name, which Compose 1 never tells.
find_postgres() {
    postgres=
    for container in $(compose ps -q postgres); do
        [ "$(docker inspect --format '{{.State.Running}}' "$container")" = false ] || postgres=$container
    done
    [ -n "$postgres" ] || return 1
    project=$(docker inspect --format "{{index .Config.Labels \"$label.project\"}}" "$postgres")
}

containers() { # SERVICE: the ids of its containers, running or not
    docker ps -aq --filter "label=$label.project=$project" --filter "label=$label.service=$1" \
        --filter "label=$label.oneoff=False"
}

container() { # SERVICE: the id of one of them; nothing where there is none
    containers "$1" | head -n 1
}

volume() { # NAME: the engine's name for that volume of the Compose file; nothing where there is none
    docker volume ls -q --filter "label=$label.project=$project" --filter "label=$label.volume=$1"
}

setting() { # SERVICE VARIABLE: what that service's containers are given
    id=$(container "$1")
    [ -n "$id" ] || die "The stack has no container of '$1'. Fix: make all of them once: docker compose up -d."
    docker inspect --format '{{range .Config.Env}}{{println .}}{{end}}' "$id" | sed -n "s/^$2=//p"
}

# What the databases and the files of the stack are kept on, as its containers were told.
datasets_at() {
    told=$(setting airflow-scheduler MLOPS_DATA_URL)
    # An address may carry a key.
    echo "$told" | sed 's#//[^/]*@#//***@#'
}
artifacts_at() {
    id=$(container mlflow)
    [ -n "$id" ] || die "The stack has no container of 'mlflow'. Fix: make all of them once: docker compose up -d."
    docker inspect --format '{{range .Args}}{{println .}}{{end}}' "$id" | sed -n 's/^--artifacts-destination=//p'
}

sql() { # DATABASE QUERY
    docker exec "$postgres" psql -U postgres -d "$1" -v ON_ERROR_STOP=1 -qAtX -c "$2"
}

# Runs a command on a volume at /files, in a container that can do nothing else; as the user that the services' files
# belong to.
on_volume() { # NAME COMMAND ARGUMENT...
    on_it=$(volume "$1")
    [ -n "$on_it" ] || die "The stack has no volume '$1'. Fix: make all of them once: docker compose up -d."
    image=$(docker inspect --format '{{.Image}}' "$postgres")
    command=$2
    shift 2
    docker run --rm --interactive --network none --read-only --cap-drop ALL --security-opt no-new-privileges \
        --user 50000:0 --volume "$on_it:/files" --entrypoint "$command" "$image" "$@"
}

# macOS has the same under another name.
if ! command -v sha256sum >/dev/null 2>&1; then
    sha256sum() { shasum -a 256 "$@"; }
fi

# One-way, so that two keys can be compared and none is told: a Fernet key is 256 random bits.
fingerprints() { # KEY,KEY: a line for each
    printf '%s\n' "$1" | tr ',' '\n' | while read -r key; do
        printf '%s' "$key" | sha256sum - | cut -c 1-16
    done
}
