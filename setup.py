"""Package layout; everything else about the project stands in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# `recipes/` and `csrc/` live at the top of the repository, where people look for them, and install as data-only
# packages. Read them with importlib.resources.files("quamba.recipes") and files("quamba_kernels.csrc"), which is
# right for a wheel and for an editable install alike; a path relative to __file__ is not.
package_dir = {"quamba_kernels": "kernels/quamba_kernels", "quamba.recipes": "recipes"}
packages = find_packages(include=["quamba", "quamba.*"]) + find_packages("kernels") + ["quamba.recipes"]
package_data = {"quamba.recipes": ["*.yaml"], "quamba.embedded": ["**/*"]}

if Path("csrc").is_dir():
    package_dir["quamba_kernels.csrc"] = "csrc"
    packages.append("quamba_kernels.csrc")
    package_data["quamba_kernels.csrc"] = ["**/*"]

setup(packages=packages, package_dir=package_dir, package_data=package_data)
