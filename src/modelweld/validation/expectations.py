"""Great Expectations over the tables: each table against the suite of its kind, and Data Docs for people to read.

Its own result documents contain clocks and random ids; only what depends on the data is kept of them.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas
from filelock import FileLock

from modelweld.errors import ConfigError
from modelweld.formats.gate import Result
from modelweld.validation.suites import FOLDER, Expectation
from modelweld.validation.tables import Table

__all__ = ["check"]

EXAMPLES = 5


def check(
    tables: Iterable[Table], suites: Mapping[str, tuple[Expectation, ...]], data_docs: Path | None = None
) -> list[Result]:
    """The result of every expectation about every table; with `data_docs`, that folder is rebuilt as HTML.

    Raises ConfigError when a suite asks for an expectation or a column that does not exist: a check that cannot be
    made is neither passed nor failed.
    """
    import great_expectations as gx
    from great_expectations.data_context.types import base as configuration

    settings = configuration.DataContextConfig(
        store_backend_defaults=configuration.InMemoryStoreBackendDefaults(),
        progress_bars=configuration.ProgressBarsConfig(globally=False, metric_calculations=False),
        analytics_enabled=False,
    )
    with _quiet():
        context: Any = gx.get_context(mode="ephemeral", project_config=settings)
        source = context.data_sources.add_pandas("modelweld")
        compiled = {
            kind: context.suites.add(gx.ExpectationSuite(kind, expectations=[_build(kind, item) for item in items]))
            for kind, items in suites.items()
        }
        assets = {kind: source.add_dataframe_asset(kind) for kind in compiled}
        results: list[Result] = []
        for table in tables:
            batch = assets[table.kind].add_batch_definition_whole_dataframe(table.subject)
            name = f"{table.subject} {table.kind}"
            definition = gx.ValidationDefinition(name=name, data=batch, suite=compiled[table.kind])
            verdict = context.validation_definitions.add(definition).run(
                batch_parameters={"dataframe": table.frame},
                expectation_parameters=dict(table.parameters),
                result_format={
                    "result_format": "COMPLETE",
                    "unexpected_index_column_names": [table.key],
                    "return_unexpected_index_query": False,
                },
            )
            rules = {item.id: item for item in suites[table.kind]}
            for outcome in verdict.results:
                rule = rules[outcome.expectation_config.meta["id"]]
                results.append(_reduce(table, rule, outcome))
        if data_docs is not None:
            _publish(context, data_docs)
    return results


def _build(kind: str, item: Expectation) -> Any:
    from great_expectations.exceptions import ExpectationNotFoundError
    from great_expectations.expectations.registry import get_expectation_impl

    where = f"{FOLDER}/{kind}.yaml: {item.id}"
    try:
        implementation = get_expectation_impl(item.type)
    except ExpectationNotFoundError as error:
        raise ConfigError(
            f"Great Expectations has no {item.type!r}", where=where, hint="take a type from its gallery"
        ) from error
    meta = {"id": item.id, "hint": item.hint, "lifted_by": list(item.lifted_by)}
    try:
        return implementation(
            severity=item.severity, notes=f"{item.id}: {item.severity}. {item.hint}", meta=meta, **item.kwargs
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"kwargs: {error}", where=where, hint=f"see the arguments of {item.type}") from error


def _reduce(table: Table, rule: Expectation, outcome: Any) -> Result:
    found: Mapping[str, Any] = outcome.result or {}
    if not found:
        raise ConfigError(
            f"cannot be checked: {_complaint(outcome.exception_info)}",
            where=f"{FOLDER}/{table.kind}.yaml: {rule.id}",
            hint=f"the columns are {', '.join(table.frame.columns)}",
        )
    success = bool(outcome.success)
    spots = [entry[table.key] for entry in found.get("unexpected_index_list") or ()]
    return Result(
        subject=table.subject,
        expectation=rule.id,
        critical=rule.severity == "critical",
        success=success,
        observed=_observed(table, rule, found),
        where=None if success else _where(table, spots),
        hint=None
        if success
        else rule.hint.format_map({"subject": table.subject, "name": table.name, "path": table.path}),
    )


def _complaint(exception_info: Mapping[str, Any]) -> str:
    """The first message in GX's exception record, which is flat for some failures and keyed by metric for others."""
    if "exception_message" in exception_info:
        return str(exception_info["exception_message"])
    return "; ".join(sorted({str(entry["exception_message"]) for entry in exception_info.values()}))


def _observed(table: Table, rule: Expectation, found: Mapping[str, Any]) -> Any:
    columns = [rule.kwargs[name] for name in ("column", "column_A", "column_B") if name in rule.kwargs]
    if table.row is None and columns:
        # A table of one row: the value itself says more than counts.
        values = [None if pandas.isna(value) else value for value in table.frame[columns].iloc[0]]
        return values[0] if len(values) == 1 else values
    if "unexpected_count" in found:
        distinct = list(dict.fromkeys(map(_hashable, found.get("unexpected_list") or ())))
        return {
            "rows": int(found["element_count"]),
            "unexpected": int(found["unexpected_count"]),
            "examples": distinct[:EXAMPLES],
        }
    if found.get("observed_value") is None and "missing_count" in found:
        return {"missing": found["partial_missing_list"]}
    return found.get("observed_value")


def _hashable(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    # The first words of a text are enough to find it by.
    return value if not isinstance(value, str) or len(value) <= 80 else f"{value[:79]}…"


def _where(table: Table, spots: list[Any]) -> str:
    if table.row is None or not spots:
        return table.path
    named = ", ".join(str(spot) for spot in spots[:EXAMPLES])
    more = f" and {len(spots) - EXAMPLES} more" if len(spots) > EXAMPLES else ""
    return f"{table.path}: {table.row} {named}{more}"


def _publish(context: Any, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    fresh.chmod(0o755)
    context.add_data_docs_site(
        site_name="modelweld",
        site_config={
            "class_name": "SiteBuilder",
            "site_name": "modelweld",
            "show_how_to_buttons": False,
            "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(fresh.resolve())},
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        },
    )
    context.build_data_docs()
    # Built aside and put in place whole: pages of checks that are no longer made would be read as if they had been,
    # and two runs may publish at once.
    with FileLock(folder.parent / f".{folder.name}.lock"):
        shutil.rmtree(folder, ignore_errors=True)
        fresh.replace(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Great Expectations without its own log lines: what it has to say is in the results."""
    logger = logging.getLogger("great_expectations")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
