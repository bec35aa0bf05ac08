"""Which folder a trained model's name means: here, where looking it up loads no torch."""

import os
from pathlib import Path

from cmdlab.errors import InputError

MODULES = Path(__file__).parent / "retrieval" / "modules"  # those that ship, a folder each


def model_folder(source: Path | str) -> Path:
    """The folder of a module that ships, by its name, or of any other trained model, absolute.

    A name that ships means that module, whatever lies in the working folder; `./NAME` is a folder.
    Raises InputError for text that is neither; what the folder holds is not looked at.
    """
    names = sorted(folder.name for folder in MODULES.glob("*") if folder.is_dir())
    if source in names:
        return MODULES / source
    if isinstance(source, str) and not Path(source).exists():
        raise InputError(
            f"{source}: is neither a folder nor one of the modules that ship "
            f"({', '.join(names) or 'none yet'}); give the folder of a trained model, as RUN/model"
        )
    return Path(os.path.abspath(source))
