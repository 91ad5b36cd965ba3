"""Finds the packages and names the folder that CMake builds; all else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["fastlars", "fastlars.*"]), cmake_source_dir="csrc")
