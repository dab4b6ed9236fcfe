"""Plug-ins by which other programs know PiCa adapters."""
