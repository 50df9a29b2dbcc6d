"""Which optional dependencies a missing module belongs to, in one line with the command that installs them.

The base installation holds what planning, merging and exporting need. Everything else is imported where it is used, so
a command that needs more fails at that import, and `explain` turns that failure into advice.
"""

from __future__ import annotations

from modelweld.errors import ConfigError

__all__ = ["explain"]

# The modules that each extra brings, by the name under which they are imported; the smaller extra comes first.
MODULES = {
    "models": {"scipy", "tokenizers", "transformers"},
    "adapters": {"peft"},
    "ray": {"ray"},
    "s3": {"boto3", "botocore", "s3fs"},
    "pipeline": {
        "aiohttp",
        "datasets",
        "dvc",
        "dvc_data",
        "dvc_objects",
        "filelock",
        "fsspec",
        "great_expectations",
        "httpx2",
        "huggingface_hub",
        "matplotlib",
        "mlflow",
        "networkx",
        "pandas",
        "PIL",
        "prefect",
        "pyarrow",
        "requests",
        "scmrepo",
        "sklearn",
        "sqlalchemy",
        "tenacity",
    },
}


def explain(error: ModuleNotFoundError) -> ConfigError | None:
    """What to install for a module that was not found; None when no extra of modelweld brings it."""
    module = (error.name or "").partition(".")[0]
    for extra, modules in MODULES.items():
        if module in modules:
            return ConfigError(f"this needs {module}, which is not installed", hint=f"pip install 'modelweld[{extra}]'")
    return None
