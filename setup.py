"""Packaging: everything is read from settings.ini, the one place where name, version and dependencies stand."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    url=settings["git_url"],
    author=settings["author"],
    author_email=settings["author_email"],
    license=settings["license_name"],
    keywords=settings["keywords"],
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=["phattn", "phattn.*"]),
    package_data={"phattn": ["py.typed", "weights/**/*"]},
    install_requires=settings["requirements"].split(),
    extras_require={
        "export": settings["export_requirements"].split(),
        "dev": (settings["dev_requirements"] + settings["export_requirements"]).split(),
    },
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": [f"{settings['lib_name']}={settings['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)
