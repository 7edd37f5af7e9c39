"""One file per family of codecs: how sealed pages are stored, made and read."""
