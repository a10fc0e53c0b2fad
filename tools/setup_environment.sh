#!/usr/bin/env bash
# Makes .venv: Python 3.12 with exactly the packages of requirements.lock, and this package itself.
#
#   tools/setup_environment.sh          what every machine needs
#   tools/setup_environment.sh --gpu    also the kernels of an NVIDIA GPU (requirements-gpu.lock)
#
# Run it again at any time: it installs what is missing, and starts over where the last run was cut
# off. PYTHON=/path/to/python3.12 chooses the interpreter. Only one set-up runs at a time.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly VENV=.venv
readonly READY=$VENV/.ready  # made last: there is no way to see which packages a cut-off run left whole

say() { printf '[setup] %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

# Is $1 a Python 3.12 that can make a virtual environment?
usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1
}

# A uv that is installed, or one in a throw-away environment of whatever python3 there is.
bootstrap_uv() {
    command -v uv && return
    local folder=$VENV/uv
    python3 -m venv "$folder" >/dev/null 2>&1 || return 1
    "$folder/bin/python" -m pip install --quiet "$(grep '^uv==' requirements.lock)" >&2 || return 1
    echo "$folder/bin/uv"
}

# The one place that knows where a Python 3.12 can hide; prints its path.
find_python() {
    local candidate uv
    if [[ -n ${PYTHON:-} ]]; then
        usable "$PYTHON" || fail "PYTHON=$PYTHON is not a working Python 3.12 with venv and ensurepip; name another or unset it"
        echo "$PYTHON" && return
    fi
    for candidate in python3.12 python3 python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12; do
        usable "$candidate" && echo "$candidate" && return
    done
    say "no python3.12 on PATH or in pyenv: asking uv for one" >&2
    if uv=$(bootstrap_uv); then
        candidate=$("$uv" python find --no-project 3.12 2>/dev/null) ||
            candidate=$("$uv" python install 3.12 >&2 && "$uv" python find --no-project 3.12) || true
        usable "$candidate" && echo "$candidate" && return
    fi
    rm -rf $VENV
    fail "no Python 3.12 with venv found: install one (pyenv install 3.12, uv python install 3.12, or apt-get install python3.12-venv) or set PYTHON=/path/to/python3.12"
}

make_venv() {
    local python
    if [[ -e $READY ]] && usable $VENV/bin/python; then
        return
    fi
    [[ ! -e $VENV ]] || say "$VENV is incomplete (a set-up was cut off, or its Python is gone): making it anew"
    rm -f $READY
    rm -rf $VENV
    python=$(find_python)
    say "making $VENV with $("$python" --version) ($python)"
    rm -rf $VENV
    "$python" -m venv $VENV
}

# uv does not read pip's settings: where pip has been told to use another index, so is uv.
adopt_pip_index() {
    local index
    [[ -n ${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-} ]] && return
    index=${PIP_INDEX_URL:-$($VENV/bin/python -m pip config get global.index-url 2>/dev/null || true)}
    [[ -z $index ]] || export UV_DEFAULT_INDEX=$index
}

install_uv() {
    local wanted
    wanted=$(grep '^uv==' requirements.lock)
    [[ "uv==$($VENV/bin/python -m uv --version 2>/dev/null | cut -d' ' -f2)" == "$wanted" ]] && return
    say "installing $wanted with pip"
    $VENV/bin/python -m pip install --quiet --disable-pip-version-check "$wanted"
}

install() {
    local -a volume=()
    [[ -t 2 ]] || volume=(--quiet)  # progress bars for people, not 164 lines for a log
    say "installing the $(wc -l <"$1") packages of $1 with uv"
    $VENV/bin/python -m uv pip install --python $VENV/bin/python "${volume[@]}" \
        --requirements "$1" "${@:2}"
}

gpu_is_there() { nvidia-smi --list-gpus >/dev/null 2>&1; }

# Transformer Engine's torch part, mamba-ssm, causal-conv1d and flash-attn are built against this torch.
install_gpu() {
    [[ -n ${CUDA_HOME:-} ]] || command -v nvcc >/dev/null ||
        fail "the GPU kernels are compiled here and need CUDA's compiler: put nvcc on PATH or set CUDA_HOME"
    # Headers of cuDNN, NCCL and of CUDA's libraries lie with the libraries that torch brought.
    local headers
    headers=$(find "$PWD"/$VENV/lib/python3.12/site-packages/nvidia -maxdepth 2 -name include -printf '%p:')
    export CPATH=$headers${CPATH:-}
    say "the kernels without a ready-made wheel are compiled now: this can take many minutes (MAX_JOBS limits memory)"
    install requirements-gpu.lock --no-build-isolation
}

main() {
    local started=$SECONDS
    [[ $# -eq 0 || $* == --gpu ]] || fail "usage: tools/setup_environment.sh [--gpu]"
    exec 9>.venv.lock
    flock --nonblock 9 || { say "another set-up is running here: waiting for it"; flock 9; }
    make_venv
    rm -f $READY
    install_uv
    adopt_pip_index
    install requirements.lock
    $VENV/bin/python -m uv pip install --python $VENV/bin/python --quiet --no-deps \
        --no-build-isolation --editable .
    touch $READY
    if [[ ${1:-} == --gpu ]]; then
        install_gpu
    elif gpu_is_there && ! $VENV/bin/python -c 'import transformer_engine_torch' 2>/dev/null; then
        say "an NVIDIA GPU is here: 'make setup-gpu' adds Transformer Engine and the fast kernels"
    fi
    say "ready in $((SECONDS - started)) s: .venv/bin/python is $($VENV/bin/python --version)"
}

main "$@"
