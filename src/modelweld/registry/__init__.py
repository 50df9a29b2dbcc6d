"""The model registry: MLflow versions that point into DVC, and a ledger of who moved which alias.

`from_record` reads a recorded run from git, `registration` turns it into a version, `gate` decides whether it may be
challenger, `transitions` is the table of what each command does to the aliases, `promotion` carries it out, `ledger`
remembers. `materialise`, `prediction` and `pyfunc_model` are the other end: what loading a version does.

    outcome = register_record(project_root, "merge-run/demo/20260101-000000", at=datetime.now(UTC), actor="ada")
    promote(open_registry(project_root, "demo"), "challenger", at=datetime.now(UTC), actor="ada")
"""
