"""Servers over one engine: the service that they share, and one package per protocol."""
