"""What torch.compile needs of the machine."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path


def has_compiler() -> bool:
    """Whether torch.compile can build CPU kernels here: it needs a C++ compiler and Python's headers."""
    has_headers = (Path(sysconfig.get_path("include")) / "Python.h").is_file()
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as inductor chooses
    return has_headers and shutil.which(compiler) is not None
