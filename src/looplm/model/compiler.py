"""What torch.compile needs of the machine."""

import shutil
import sysconfig
from pathlib import Path


def has_compiler() -> bool:
    """Whether torch.compile can build CPU kernels here: it needs a C++ compiler and Python's headers."""
    has_headers = (Path(sysconfig.get_path("include")) / "Python.h").is_file()
    return has_headers and any(shutil.which(name) for name in ("g++", "clang++", "c++"))
