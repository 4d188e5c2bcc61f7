from cmfast.ops import _dispatch

if _dispatch.INTERPRETING:
    from tests.interpreter import patch_once

    patch_once()
