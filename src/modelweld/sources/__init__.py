"""Where models and data come from: pinned once to something immutable, then fetched exactly as pinned.

`pinning` resolves params.yaml into sources.lock.json (modelweld.formats.lock), `changes` compares two locks, `fetching`
puts the files of one entry on the disk.
`source` says what every kind of source can do; `local`, `hub`, `url`, `mlflow_models` and `dvc_repo` do it, one kind of
address each; `schemes` is the table of kinds. `selection` decides which of a source's files are fetched,
`remote_headers` reads the headers of weights that are not fetched, `refusals` refuses unsafe names and addresses.

    lock = pin(load_params(), Path(), previous=Lock.read_if_present(Path("sources.lock.json")))
    fetch(lock.pinned["model-base"], Path("models/base"), project_root=Path())
"""

from modelweld.formats.lock import LOCK_NAME, Lock, Pinned, PinnedFile
from modelweld.sources.changes import Change, changes
from modelweld.sources.fetching import Fetched, fetch
from modelweld.sources.pinning import pin, resolve

__all__ = [
    "LOCK_NAME",
    "Change",
    "Fetched",
    "Lock",
    "Pinned",
    "PinnedFile",
    "changes",
    "fetch",
    "pin",
    "resolve",
]
