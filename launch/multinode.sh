#!/bin/bash
# Fine-tune on the hosts of a file, without a scheduler: DeepSpeed's own launcher over pdsh and ssh.
#
#   launch/multinode.sh HOSTFILE --lisa_config configs/lisa.yaml [--resume auto] [key=value ...]
#
# A line of HOSTFILE is `name slots=N`: a host, and the ranks to start on it. Every host needs the same directories, this
# environment included, and lets this user in by key. docs/slurm.md says more.
#
#   LISA_ENV          names of further variables that the ranks need ("LD_LIBRARY_PATH MY_PROXY"), separated by spaces
#   LISA_DEEPSPEED    further options of the launcher ("--master_port 29501 --include host1")
#   LISA_SSH_TIMEOUT  seconds after which a host counts as not reachable; 10
#   LISA_TRAIN        other than `launch/train.py`

set -euo pipefail

refuse() {
    echo "multinode.sh: error: $*" >&2
    exit 2
}

(($# >= 2)) || refuse "usage: launch/multinode.sh HOSTFILE --lisa_config FILE [--resume auto] [key=value ...]"
hostfile=$1
shift
train=${LISA_TRAIN:-launch/train.py}
[[ -f $train ]] || refuse "$PWD/$train: no such file; start it in the repository's root, or set LISA_TRAIN"
[[ -f $hostfile ]] || refuse "$hostfile: no such file"
for program in deepspeed pdsh ssh; do
    command -v "$program" >/dev/null || refuse "there is no $program on this host"
done

hosts=()
number=0
while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    line=${line%%#*}
    [[ -n ${line//[[:space:]]/} ]] || continue
    [[ $line =~ ^[[:space:]]*([^[:space:]]+)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*$ ]] ||
        refuse "$hostfile: line $number: should be 'name slots=N', got '$line'"
    for host in "${hosts[@]}"; do
        [[ $host != "${BASH_REMATCH[1]}" ]] || refuse "$hostfile: line $number: $host is there twice; give it more slots"
    done
    hosts+=("${BASH_REMATCH[1]}")
done <"$hostfile"
((${#hosts[@]})) || refuse "$hostfile: names no host"

python=$(command -v python)
here=$(pwd -P)
[[ $train == /* ]] || train=$here/$train
for host in "${hosts[@]}"; do
    # -n: ssh would read the rest of what the loop reads.
    ssh -n -o BatchMode=yes -o ConnectTimeout="${LISA_SSH_TIMEOUT:-10}" "$host" true ||
        refuse "$hostfile: $host: not reachable by ssh without a password; try: ssh -o BatchMode=yes $host true"
    for path in "$here" "$train" "$python"; do
        ssh -n -o BatchMode=yes "$host" test -e "$path" ||
            refuse "$hostfile: $host: has no $path; every host needs the same directories"
    done
done

# DeepSpeed passes on only what begins with PYTHON, NCCL and the like; all else goes by a file that it reads.
names='^(PATH|VIRTUAL_ENV|OMP_NUM_THREADS|TOKENIZERS_PARALLELISM|(DS|GLOO|HF|LISA|TORCH|TRITON|WANDB)_[A-Z0-9_]+)$'
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
while IFS= read -r name; do
    [[ $name != DS_ENV_FILE ]] && [[ $name =~ $names || " ${LISA_ENV:-} " == *" $name "* ]] || continue
    [[ ${!name} != *[\"\$\`\\$'\n']* ]] || refuse "$name: cannot be passed on: it has quotes, dollars or line ends"
    echo "$name=${!name}"
done < <(compgen -e) >"$DS_ENV_FILE"

read -ra options <<<"${LISA_DEEPSPEED:-}"
deepspeed --hostfile "$hostfile" --launcher pdsh "${options[@]}" "$train" "$@"
