"""A folder for `sys.path`, where processes that a script spawns find `cm`: see `_shim.serve_spawned`."""
