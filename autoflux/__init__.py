"""autoflux measures a machine, plans the best way to run a FLUX-family model on it, and runs it.

The public names are those of `__init__.pyi`. They load on first use, so `import autoflux` is quick and imports no
torch. Plugins import from here only.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
