"""Package layout; everything else about the project stands in pyproject.toml."""

from setuptools import find_packages, setup

# Recipes and CUDA sources live at the top of the repository, where people look for them. Their packages reach them
# through the symbolic links quamba/recipes and kernels/quamba_kernels/csrc, so files("quamba") / "recipes" is right
# in a wheel, in an editable install and in a bare checkout; mapping them as packages breaks the editable install
# unless these folders hold an __init__.py.
setup(
    packages=find_packages(include=["quamba", "quamba.*"]) + find_packages("kernels"),
    package_dir={"quamba_kernels": "kernels/quamba_kernels"},
    package_data={
        "quamba": ["recipes/*.yaml", "recipes/schemes/*.yaml"],
        "quamba.bench": ["*.yaml", "devices/*.yaml"],
        "quamba.embedded": ["*.md", "*.txt", "*/*.json", "*/*.safetensors"],
        "quamba_kernels": ["csrc/**/*"],
    },
)
