"""Where sealed pages live once the device has no room for them: main memory, then a disk. No JAX here."""
