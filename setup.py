"""Metadata is in pyproject.toml; the extension module is built by CMakeLists.txt."""

from setuptools import setup

setup(cmake_source_dir=".")
