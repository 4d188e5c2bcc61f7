"""Which folders become which packages. Everything else is in pyproject.toml."""

from setuptools import find_packages, setup

# Folders of the checkout's top level that install inside cmfast, as {"cmfast.name": "name"}. They are
# listed by hand: discovery would install them as global packages of their own name, over other projects'.
TOP_LEVEL = {"cmfast.kernels": "kernels", "cmfast.benchmarks": "benchmarks"}

setup(
    packages=[*find_packages(include=["cmfast", "cmfast.*"]), *TOP_LEVEL],
    package_dir=TOP_LEVEL,
)
