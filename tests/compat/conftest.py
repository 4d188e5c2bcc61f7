# Run by tests, not collected: their imports resolve under `python -m cmfast.compat.openai` alone.
collect_ignore = ["scripts"]
