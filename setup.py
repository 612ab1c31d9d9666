"""The C kernel of the codecs: one for every Python from 3.11 on; where it cannot be built, NumPy does its work."""

import sysconfig

from setuptools import Extension, setup

FOLDER = "src/everystep/codecs/kernel"
# A Python without the interpreter's lock has no stable interface: there it is built for that one version.
STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    ext_modules=[
        Extension(
            "everystep.codecs._kernel",
            sources=[f"{FOLDER}/{name}.c" for name in ("module", "codes", "packed", "sparse", "planes")],
            depends=[f"{FOLDER}/{name}.h" for name in ("packed", "words", "blocks", "block")],
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if STABLE else [],
            py_limited_api=STABLE,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE else {},
)
