"Builds the package from settings.ini, which nbdev reads too: one place for names, versions and requirements"

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="])
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

suffix = "_requirements"
extras = {k.removesuffix(suffix).replace("_", "-"): cfg[k].split() for k in cfg if k.endswith(suffix)}

setup(
    name=cfg["dist_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3",
    ],
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    # The figure notebooks are written in nbs/figures and travel with the package as stars/figures.
    packages=[*find_packages(include=["stars", "stars.*"]), "stars.figures"],
    package_dir={"stars.figures": "nbs/figures"},
    package_data={"stars": ["bases/**", "prices.json", "no_mathematics.jsonl"], "stars.figures": ["*.ipynb"]},
    zip_safe=False,
)
