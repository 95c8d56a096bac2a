"""setuptools' PEP 517 backend, compiling against the torch that the environment already has.

An extension works only with the torch it was compiled for, but pip builds in an isolated environment that hides what is
installed and would download a second, possibly different torch. So: look where the environment's own torch lies, make
it importable at the end of sys.path (the isolated setuptools and ninja come first), and ask pip for torch only where
there is none.
"""

import importlib.util
import json
import os
import subprocess
import sys

from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)

TORCH = "torch>=2.11"


def run_outside(*arguments):
    """Runs the environment's Python as its user would, and returns what it prints, or '' where it fails."""
    # pip isolates a build through these variables; without them --system-site-packages and the user's own packages
    # are seen again.
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    done = subprocess.run([sys.executable, *arguments], env=environ, cwd="/", capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def use_installed_torch():
    """Makes torch importable where it is installed; says whether it is."""
    if importlib.util.find_spec("torch") is None:
        find = "import os, importlib.util as u; print(os.path.dirname(os.path.dirname(u.find_spec('torch').origin)))"
        folder = run_outside("-c", find)
        if not folder:
            return False
        sys.path.append(folder)
    return True


def torch_to_come():
    """The torch that pip is about to install: the build's must be the same, but pip's constraints do not reach it."""
    report = run_outside("-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--report", "-", TORCH)
    try:
        return "torch==" + json.loads(report)["install"][0]["metadata"]["version"]
    except (ValueError, LookupError):
        return TORCH


TORCH_FOUND = use_installed_torch()


def get_requires_for_build_wheel(config_settings=None):
    return [] if TORCH_FOUND else [torch_to_come()]


get_requires_for_build_editable = get_requires_for_build_wheel
get_requires_for_build_sdist = get_requires_for_build_wheel
