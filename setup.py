"""Packaging of dsmim. `dsmim/ds_configs` and `dsmim/slurm` are links to the folders at the root, so that users find
the files where they look for them and an installed wheel carries them too."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
_LINES = (ROOT / "dsmim/__init__.py").read_text().splitlines()
VERSION = next(line.split('"')[1] for line in _LINES if line.startswith("__version__"))
REMOTE = ["fsspec[http]>=2024.6", "s3fs>=2024.6"]  # the tests need them too

setup(
    name="dsmim",
    version=VERSION,
    description="Billion-parameter vision models on DeepSpeed: SimMIM and DeiT III from WebDataset tars",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dsmim", "dsmim.*"]),
    package_data={
        "dsmim": ["recipes/*.yaml", "ds_configs/*.json", "slurm/*.sbatch", "slurm/*.sh", "slurm/profiles/*.yaml"]
    },
    install_requires=[
        "torch>=2.8",
        "torchvision>=0.23",
        "timm>=1.0.22,<1.1",
        "deepspeed>=0.19.8,<0.20",
        "mpi4py>=4.1",
        "webdataset>=1.0",
        "pyyaml>=6",
        "psutil>=5.9.4",
        "pydantic>=2.7",
        "safetensors>=0.4",
        "tqdm>=4.60",
        "numpy>=1.26",
        "pillow>=10",
        "tensorboard>=2.15",
    ],
    extras_require={
        "demo": ["elpv-dataset==1.0.0.post1", "scikit-learn>=1.4"],
        "remote": REMOTE,
        "peers": ["grain>=0.2.16", "megatron-energon>=7", "webdataset>=1.0", "datasets>=5", "torchdata>=0.11"],
        "test": [
            *REMOTE,
            "moto[s3,server]>=5.0.20",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "openmpi>=5",
            "scikit-learn>=1.4",
        ],
    },
    entry_points={"console_scripts": ["dsmim = dsmim.cli.main:main"]},
)
