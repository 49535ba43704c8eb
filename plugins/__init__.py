"""Plugins that ship with autoflux. They use the public hooks and import only public names of `autoflux`."""
