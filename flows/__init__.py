"""The pipelines as Prefect flows: when they run, what is tried again, what its pages show. The stages are dvc.yaml's.

`merge` is the mission; `steps` are its tasks; `crashed_runs` reports runs whose process died; `server` is
there when no other Prefect server is.

    from modelweld.flows.merge import merge
    merge(project=".")
"""
