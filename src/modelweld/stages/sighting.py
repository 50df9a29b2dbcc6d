"""The models of a params.yaml, looked at before they are fetched: here where they are here, else at their source."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from modelweld.config import Params, Recipe, SourceEntry
from modelweld.errors import ConfigError
from modelweld.formats.lock import LOCK_NAME, Kind, Lock, Pinned
from modelweld.sources.refusals import refuse_secrets
from modelweld.sources.remote_headers import read_remote_headers
from modelweld.sources.schemes import open_source
from modelweld.sources.selection import PICKLE_SUFFIXES, select
from modelweld.sources.source import Listed, Source
from modelweld.stages.fetch import project_root


@dataclass(frozen=True)
class Sighting:
    """A merge and its baselines over models that can be opened, though their weights may not be there.

    `fetch` are the bytes that fetching would bring, by entry of the lock; `seen` says where each model that is not
    fetched was looked at.
    """

    recipe: Recipe
    baselines: Mapping[str, Recipe]
    fetch: Mapping[str, int]
    seen: Mapping[str, str]


@contextmanager
def sighted(params: Params, root: Path) -> Iterator[Sighting]:
    """What can be seen of the models of `params`, whose project is `root`, for as long as the context lasts.

    Of remote models only the headers of their weights are read, and small files. Raises ConfigError naming the models
    that must be fetched first: pickles, and sources that hand over nothing but whole files.
    """
    merge, baselines = params.recipe(), {name: params.recipe(name) for name in params.baselines}
    experts = (name for recipe in (merge, *baselines.values()) for name in recipe.models or {})
    lock = Lock.read_if_present(root / LOCK_NAME)
    unseen: dict[str, str] = {}
    paths: dict[str, Path] = {}
    sizes: dict[str, int] = {}
    seen: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="modelweld-plan-") as scratch:
        for name in ["base", *dict.fromkeys(experts)]:
            entry = lock.pinned.get(f"model-{name}") if lock is not None else None
            if _is_here(root / "models" / name, params.models[name], entry):
                paths[name] = root / "models" / name
                continue
            source, files = _listed("model", name, params.models[name], root, lock)
            sizes[f"model-{name}"] = sum(file.size_bytes for file in files.values())
            pickled = [file for file in files if _is_pickled(file)]
            if pickled or not source.supports_range_reads:
                unseen[name] = f"{pickled[0]} is pickled" if pickled else "its source hands over whole files"
            elif source.directory is not None:
                paths[name], seen[name] = source.directory, str(source.directory)
            else:
                paths[name], seen[name] = Path(scratch) / name, source.address
                read_remote_headers(source, files, paths[name])
        if unseen:
            reasons = "; ".join(f"{name} ({why})" for name, why in unseen.items())
            raise ConfigError(
                f"cannot be looked at before they are fetched: {reasons}",
                where="models",
                hint=f"`modelweld pin`, then `dvc repro {' '.join(f'fetch@model-{name}' for name in unseen)}`",
            )
        for name, wanted in params.datasets.items():
            if not (root / "datasets" / name).exists():
                _, files = _listed("dataset", name, wanted, root, lock)
                sizes[f"dataset-{name}"] = sum(file.size_bytes for file in files.values())
        placed = {name: _placed(recipe, paths, root) for name, recipe in baselines.items()}
        yield Sighting(_placed(merge, paths, root), placed, sizes, seen)


def _is_here(folder: Path, wanted: SourceEntry, entry: Pinned | None) -> bool:
    """Whether a fetched model is what params.yaml names now; one that was put there by hand is believed."""
    if not folder.is_dir() or entry is None:
        return folder.is_dir()
    kept = {name: file for name, file in entry.files.items() if not _is_pickled(name)}
    sizes = {name: (folder / name).stat().st_size for name in kept if (folder / name).is_file()}
    return entry.uri == wanted.uri and sizes == {name: file.size_bytes for name, file in kept.items()}


def _is_pickled(name: str) -> bool:
    # A fetch rewrites pickles, and leaves their index out.
    return Path(name.removesuffix(".index.json")).suffix.lower() in PICKLE_SUFFIXES


def _listed(
    kind: Kind, name: str, wanted: SourceEntry, root: Path, lock: Lock | None
) -> tuple[Source, Mapping[str, Listed]]:
    """A source as it is pinned, or as it is now when it is not, and the files that a fetch would bring."""
    where = f"{kind}s.{name}.uri"
    refuse_secrets(wanted.uri, where)
    entry = lock.pinned.get(f"{kind}-{name}") if lock is not None else None
    if entry is not None and entry.uri == wanted.uri:
        files = {file: Listed(f.size_bytes, f.sha256, f.version) for file, f in entry.files.items()}
        return open_source(entry.resolved, project_root(root), where), files
    source = open_source(wanted.uri, project_root(root), where)
    listing = source.resolve()
    chosen = select(listing.files, kind, wanted.allow_pickle, where)
    return source, {file: listing.files[file] for file in chosen.wanted}


def _placed(recipe: Recipe, paths: Mapping[str, Path], root: Path) -> Recipe:
    models = {
        name: entry.model_copy(update={"path": str(paths[name])}) for name, entry in (recipe.models or {}).items()
    }
    return recipe.rooted(root).model_copy(update={"base": str(paths["base"]), "models": models})
