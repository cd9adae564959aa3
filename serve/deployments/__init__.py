"""The models that are served, a file each, and the encoders that they share. A file NAME.py that a config's `models` may name has

    Settings                      its settings, a Scale
    build(graph, settings)        checks what it can without loading, and returns the deployment, bound

The gateway asks it as `NAME`, from routes/NAME.py. Every deployment has `about()`, and a `check_health()` that runs its model.
What is heavy (torch, faiss) is imported by a replica's `__init__`: the process that builds the graph has no need of it.
"""
