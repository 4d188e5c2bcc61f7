"""`cm` in a process that a script spawned, which imports the script anew."""

from cmfast.compat.openai import _shim

if __name__ == "cm":  # not where a tool imports every module there is
    _shim.install(_shim.inherited_settings())
